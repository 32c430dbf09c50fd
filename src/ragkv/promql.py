"""The dashboard's queries, from metrics' names. Each picks its series by the dashboard's variables."""

from ragkv.grafana import Query

SELECTED = 'model_name=~"$model_name",instance=~"$instance",engine=~"$engine"'


def pick(name: str, *more: str) -> str:
    """The selected series of a metric; `more`: further matchers."""
    return f"{name}{{{','.join((SELECTED, *more))}}}"


def total(name: str, by: str = "") -> str:
    """The sum of what is there now; `by`: labels to keep."""
    return f"sum{_by(by)} ({pick(name)})"


def rate(name: str, *more: str, by: str = "") -> str:
    """A counter's growth by the second, summed."""
    return f"sum{_by(by)} (rate({pick(name, *more)}[$__rate_interval]))"


def grown(name: str, *more: str) -> str:
    """A counter's growth over the dashboard's range, 0 where it is not there yet."""
    return f"(sum(increase({pick(name, *more)}[$__range])) or vector(0))"


def grown_or_new(name: str) -> str:
    """As `grown`; series that were not there when the range began count from 0."""
    series = pick(name)
    return f"(sum(({series} unless {series} offset $__range) or increase({series}[$__range])) or vector(0))"


def or_zero(expression: str, by: str = "") -> str:
    """0 where an expression has no series; `by`: the label that says "none" then."""
    nothing = f'label_replace(vector(0), "{by}", "none", "", "")' if by else "vector(0)"
    return f"({expression} or on() {nothing})"


def counts(name: str, by: str, prefix: str = "") -> Query:
    """A counter's growth by labels, which are the legend too."""
    return Query(or_zero(rate(name, by=by), by.split(", ")[0]), prefix + _legend(by))


def so_far(name: str, by: str) -> Query:
    """A counter's value by labels, for what is rare: a rate does not see how it comes to be 1."""
    return Query(or_zero(total(name, by), by.split(", ")[0]), _legend(by))


def quantile(part: float, name: str, by: str = "") -> str:
    """Of a histogram."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({part}, {rate(name + '_bucket', by=labels)})"


def quantiles(name: str, *parts: float) -> list[Query]:
    """Of one histogram, several."""
    return [Query(quantile(part, name), f"p{100 * part:g}") for part in parts]


def _legend(labels: str) -> str:
    return " ".join(f"{{{{{label}}}}}" for label in labels.split(", "))


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""
