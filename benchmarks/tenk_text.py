"""The sentences, tables and names that generated filings are put together from (see `ragkv.benchmarks.tenk`)."""


def pool(text: str) -> tuple[str, ...]:
    """The entries of a block of text, each starting with "- " and free to run over several lines."""
    return tuple(" ".join(entry.split()) for entry in text.split("\n- ")[1:])


# In every template {2..9} stands for a number in that range, {name} for a phrase or fact of that name.
INDUSTRIES = pool("""
- Industries | flow and motion products | stainless bar, machined castings, copper wire, electric motors |
  chemical processors, water utilities, machine builders, food processors, shipyards | Flow Control: metering
  pumps, isolation valves, dosing skids | Filtration: membrane cartridges, dust collectors, coolant filters |
  Motion Systems: linear actuators, gear reducers, servo drives | Thermal: heat exchangers, chillers, boilers
- Packaging | packaging products | polyethylene resin, aluminum coil, recycled fiber, adhesives | beverage
  bottlers, dairies, contract packers, pharmacies | Flexible Films: barrier films, pouches, shrink sleeves |
  Containers: bottles, thin-wall tubs, steel pails | Closures: dispensing caps, trigger sprayers, safety lids
- Medical | medical devices | medical-grade silicone, lithium cells, titanium rod, sterile nonwovens |
  hospitals, surgery centers, nursing homes, blood banks | Infusion: syringe pumps, catheters, tubing sets |
  Surgical: bone screws, powered handpieces, retractors | Monitoring: bedside monitors, oximeters, telemetry
  units
""")
PHRASES = pool("""
- stem: North, Bright, Oak, Stone, Silver, Cold, Fair, Hazel, Lake, Ash, Clear, East, Gran, Har, Iron, Mill
- end: wind, water, mere, gate, brook, crest, haven, ridge, ford, field, mont, dale, port, bury, well, view
- first: Marian, Douglas, Priya, Anton, Lucille, Theodore, Renata, Samuel, Ingrid, Wallace, Noor, Felix
- last: Aldersey, Bannock, Castellow, Drummond, Eskridge, Fairlamb, Godwin, Ingleby, Jarrow, Kessock, Lorimer
- home: Milwaukee Wisconsin 53202, Toledo Ohio 43604, Tulsa Oklahoma 74103, Peoria Illinois 61602
- incorporated: Delaware, Nevada, Maryland, Virginia
- geo: Germany, Mexico, Brazil, Poland, Japan, Canada, India, Vietnam, France, Italy, Spain, Turkey, Chile,
  Thailand, Australia, Malaysia, the Netherlands, the United Kingdom, South Korea, South Africa, Portugal
- place: Dayton, Monterrey, Lodz, Chennai, Greenville, Bursa, Guelph, Curitiba, Penang, Zaragoza, Brno, Osaka,
  Lyon, Eindhoven, Da Nang, Waterloo, Bergamo, Santiago, Adelaide, Boise, Durban, Rayong, Leeds, Erie, Porto
- brand: Verrano, Kestrel, Aldine, Pallas, Tresco, Ondine, Marlin, Fenwick, Corvane, Solway, Brisa, Quillon
- since: 1948, 1956, 1963, 1971, 1978, 1984, 1989, 1993, 1997, 2002, 2006
- past: {y}, {y1}, {y2}
- quarter: first, second, third, fourth
- gain: higher selling prices, higher volume of {product}, new accounts among {customer}, recovering demand in
  {geo}, better factory absorption in {place}, lower freight rates, a favorable mix toward {product}
- drag: the cost of {input}, lower volume of {product}, a stronger dollar, start-up costs in {place}, wage
  inflation, destocking by {customer}, port congestion
- effect: reduce our net sales, increase our cost of sales, delay shipments of {product}, harm our reputation
  with {customer}, require write-downs in {place}, divert management's attention, cost us sales to {customer}
""")
TITLES = pool("""
- 1 Business
- 1A Risk Factors
- 2 Properties
- 3 Legal Proceedings
- 5 Market for Registrant's Common Equity and Issuer Purchases of Equity Securities
- 7 Management's Discussion and Analysis of Financial Condition and Results of Operations
- 7A Quantitative and Qualitative Disclosures About Market Risk
- 8 Financial Statements and Supplementary Data
- 10 Directors, Executive Officers and Corporate Governance
- 15 Exhibits and Signatures
""")
COVER = """UNITED STATES SECURITIES AND EXCHANGE COMMISSION
Washington, D.C. 20549
FORM 10-K
ANNUAL REPORT PURSUANT TO SECTION 13 OR 15(d) OF THE SECURITIES EXCHANGE ACT OF 1934
For the fiscal year ended {yearend}

{company}
(Exact name of registrant as specified in its charter)
{incorporated}                    89-{21..99}{100..999}{10..99}
(State of incorporation)          (I.R.S. Employer Identification No.)
{100..990} {brand} Avenue, {city}, {state} {zip}
(Address of principal executive offices)

Securities registered pursuant to Section 12(b) of the Act:
Common Stock, $0.01 par value          {ticker}          New York Stock Exchange"""
# Item, rank (0 is always kept, the highest go first as filings get shorter), and a paragraph.
FIXED = pool("""
- 1 | 0 | {company} ("{short}," "we" or "our"), incorporated in {incorporated} in {since}, designs, makes and
  sells {trade}. Our headquarters are in {city}, {state}. {ceo} is our Chief Executive Officer.
- 1 | 0 | We have {count} reportable segments: {segments}. {largest} is the largest, with net sales of ${top}
  million in fiscal {y}. At {yearend} we had about {employees} employees, {22..64}% of them abroad.
- 1A | 3 | An investment in our common stock involves risk. The matters below, and others that we do not know
  of or now consider immaterial, could materially harm our business and our results of operations.
- 2 | 4 | We operate {14..38} plants and {20..70} warehouses and offices in {11..26} countries, and consider
  them suitable and adequate for our needs. We own our headquarters building in {city}.
- 3 | 4 | We are party to claims that arise in the ordinary course of business, and do not expect their
  outcome to be material to our financial position.
- 5 | 4 | Our common stock trades on the New York Stock Exchange under the symbol {ticker}. It had
  {2100..9800} holders of record at {yearend}. We paid dividends of ${dividends} million in fiscal {y} and
  ${dividends1} million in fiscal {y1}, and bought back shares for ${repurchases} million in fiscal {y}.
- 7 | 2 | Net sales in fiscal {y} were ${sales} million, compared with ${sales1} million in fiscal {y1}. Gross
  profit was ${gross} million. Net income was ${net} million, or ${eps} per diluted share, compared with
  ${net1} million, or ${eps1} per diluted share, in the prior year.
- 7 | 2 | {by_segment_table}
- 7 | 3 | Operating activities provided ${operations} million of cash in fiscal {y}, compared with
  ${operations1} million in fiscal {y1}. Capital expenditures were ${capex} million. At year-end we held
  ${cash} million of cash and owed ${debt} million under senior notes and a term loan, of which ${current}
  million is due within one year.
- 7A | 4 | We are exposed to changes in interest rates, currencies and commodity prices. Interest expense for
  fiscal {y} was ${interest} million, and a rise of one point would have added ${1..6} million.
- 8 | 0 | {income_table}
- 8 | 1 | {balance_table}
- 8 | 2 | {cash_table}
- 8 | 3 | NOTES TO CONSOLIDATED FINANCIAL STATEMENTS. The statements include {company} and its majority-owned
  subsidiaries. Preparing them requires estimates, from which actual results could differ. Inventories are
  stated at the lower of first-in, first-out cost and net realizable value.
- 10 | 4 | The information required by Items 10 to 14 is incorporated by reference to our proxy statement for
  the next annual meeting of shareholders.
- 15 | 2 | SIGNATURES. Pursuant to Section 13 or 15(d) of the Securities Exchange Act of 1934, the registrant
  has caused this report to be signed on its behalf by {ceo}, its Chief Executive Officer, and by {cfo}, its
  Chief Financial Officer.
""")
# What fills an item up to the length asked for: "title :: first sentence" (a), then two sentences of (b).
GROWTH = pool("""
- 1 a | {seg} :: {seg} sells {product} and {product} to {customer}, with {40..900} accounts in {geo}.
- 1 a | {seg} :: In {place} and {place} we make {product}, and ship most orders within {4..60} days.
- 1 a | {seg} :: In {geo}, {seg} reaches {customer} through {12..140} distributors that also stock {product}.
- 1 b | Its {product} carry the {brand} name, in use since {since}, and are sold as {brand} in {geo}.
- 1 b | We compete on delivery, reliability and price, chiefly with {3..14} makers of {product} in {geo}.
- 1 b | We buy {input} from {2..9} vendors and keep {20..95} days of supply on hand in {place}.
- 1 b | Backlog for {product} was ${12..190} million, of which {71..96}% should ship within a year.
- 1 b | We hold {15..160} patents on {product}, none by itself material, that expire by {later}.
- 1A a | Demand for our {product} is cyclical. :: Orders from {customer} in {geo} fell {6..28}% in the second
  half of fiscal {past}, and earlier downturns brought similar swings.
- 1A a | Competition in {geo} could reduce our share of {product}. :: We face {3..11} regional manufacturers
  there, some of which accept lower margins than we do to win business from {customer}.
- 1A a | We may fail to develop {product} that customers want. :: A new design takes {9..36} months to reach
  {customer}, and in fiscal {past} we ended {2..7} projects after trials in {geo} fell short.
- 1A a | We depend on few suppliers of {input}. :: Two vendors provide {52..91}% of what we use in {place},
  and qualifying another for {product} would take {5..20} months.
- 1A a | An interruption at our {place} plant would be costly. :: The plant makes {35..90}% of our {product}
  and was idle for {2..19} days in fiscal {past} after a fire.
- 1A a | A cyberattack could halt our plants or expose data. :: In fiscal {past} we investigated {14..260}
  incidents, one of which stopped the scheduling system in {place} for {5..70} hours.
- 1A a | Product liability claims for {product} could exceed our insurance. :: At year-end {7..190} claims
  from users in {geo} were open, and one award in fiscal {past} came to ${2..14} million.
- 1A a | Tariffs may raise the cost of {input}. :: About {11..58}% of what we buy comes from {geo}, and duties
  announced in fiscal {past} added ${2..31} million to cost of sales.
- 1A b | We are most exposed in {geo}, where {customer} bought ${14..230} million of {product} in {past}.
- 1A b | A similar problem in {place} in fiscal {past} took {3..26} weeks to fix and cost ${2..18} million.
- 1A b | Any of these developments in {geo} could {effect} or {effect}.
- 1A b | If this happened again in {geo}, it could {effect}, and results could suffer for {2..6} quarters.
- 1A b | We have taken steps to limit the risk, such as dual sourcing in {place}, but they could fail.
- 2 a | Our {place} plant makes {product} on {80..940} thousand square feet and ran {58..97}% full.
- 2 a | We lease {60..720} thousand square feet in {place} to distribute {product} to {customer} in {geo}.
- 3 a | In fiscal {past} {customer} in {geo} sued us over {product} from {place}, seeking ${2..64} million.
- 7 a | {seg} :: Net sales of {product} in {geo} rose {2..14}.{0..9}% in fiscal {past}, driven by {gain}.
- 7 a | {seg} :: Net sales of {product} in {geo} fell {2..12}.{0..9}% in fiscal {past}, owing to {drag}.
- 7 a | {seg} :: In {geo}, orders from {customer} rose {2..19}.{0..9}% on {gain}, despite {drag}.
- 7 b | Pricing added {1..4}.{0..9} percentage points, and currency in {geo} took away {0..2}.{1..9}.
- 7 b | Gross margin on {product} changed by {20..310} basis points, reflecting {gain} as well as {drag}.
- 7 b | Selling expenses in {geo} were ${12..28} million, against ${9..31} million, owing to {drag}.
- 7 b | We closed {2..4} lines in {place} in fiscal {past}, at a cost of ${2..17} million in severance.
- 8 a | Revenue :: Sales of {product} to {customer} in {geo} are recognized on shipment.
- 8 a | Leases :: Lease cost in {place} and {place} was ${2..36} million in fiscal {past}.
- 8 a | Derivatives :: Forward contracts for ${20..340} million hedge purchases of {input} in {place}.
- 8 a | Retirement Benefits :: The plan in {place}, closed in {since}, is funded to {74..108}%.
- 8 a | Contingencies :: We must buy ${8..210} million of {input} from suppliers in {geo} by {later}.
- 8 b | Balances in {geo} use inputs of Level {1..3}, and a 1% change would move them by ${2..9} million.
- 8 b | The related asset in {place} has a life of {2..19} years and was tested in the {quarter} quarter.
- 8 b | Amounts for fiscal {past} include ${2..12} million that related to {product} for {customer} in {geo}.
""")
WEIGHTS = {"1": 22, "1A": 34, "2": 2, "3": 2, "7": 20, "8": 20}
# Title and rows "label=account"; $ marks rows with dollar signs, - accounts that are shown negated.
TABLES = pool("""
- income: CONSOLIDATED STATEMENTS OF INCOME; $Net sales=sales; Cost of sales=cost; Gross profit=gross;
  Selling, general and administrative=sga; Research and development=rnd; Operating income=operating; Interest
  expense=interest; Income before income taxes=pretax; Provision for income taxes=tax; $Net income=net;
  Weighted average diluted shares=diluted; $Diluted earnings per share, in dollars=eps
- balance: CONSOLIDATED BALANCE SHEETS; $Cash and cash equivalents=cash; Accounts receivable, net=receivables;
  Inventories=inventories; Property, plant and equipment, net=plant; Goodwill=goodwill; $Total assets=assets;
  $Accounts payable and accrued liabilities=payables; Current portion of long-term debt=current; Long-term
  debt, less current portion=long_term; Total liabilities=liabilities; Common stock and paid-in
  capital=paid_in; Retained earnings, less treasury stock=retained; Total shareholders' equity=equity; $Total
  liabilities and equity=claims
- cash: CONSOLIDATED STATEMENTS OF CASH FLOWS; $Net income=net; Depreciation=depreciation; Change in
  receivables=-more_receivables; Change in inventories=-more_inventories; Change in payables and accrued
  liabilities=more_payables; Net cash provided by operating activities=operations; Additions to property,
  plant and equipment=-capex; Net change in borrowings=borrowed; Dividends paid=-dividends; Purchases of
  treasury stock=-repurchases; Net change in cash=change; Cash at beginning of year=opening; $Cash at end of
  year=cash
- by_segment: NET SALES BY SEGMENT; {segment_rows}; $Total net sales=sales
""")
# Question | answer | the words that show the filing, however short, to hold the answer.
QUESTIONS = pool("""
- What were net sales in {when}, in millions of dollars? | {sales} | Net sales
- What were diluted earnings per share in {when}, in dollars? | {eps} | Diluted earnings
- Who is the Chief Executive Officer? | {ceo} | is our Chief Executive Officer
- About how many employees does the company have? | {employees} | employees
- In which city are the company's headquarters? | {city} | Our headquarters
- Which segment had the largest net sales in {when}? | {largest} | is the largest
- In which state is the company incorporated? | {incorporated} | State of incorporation
- What was net income in {when}, in millions of dollars? | {net} | Net income
- What was long-term debt, less current portion, at the end of {when}? | {long_term} | Long-term debt
- What was capital expenditure in {when}, in millions of dollars? | {capex} | Additions to property
- What were total assets at the end of {when}, in millions of dollars? | {assets} | Total assets
""")
