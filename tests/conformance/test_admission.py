"""The suite of `ragkv.testing.admission` on every admission policy, and what each of them is for."""

import pytest

from processes import told_by_seeds
from ragkv.policies import ADMISSIONS, Costly, Frequency, SecondSight, make_admission
from ragkv.testing.admission import AdmissionTests, Named, key_of

SMALL = ADMISSIONS | {"second-sight": lambda: SecondSight(500), "frequency": lambda: Frequency(500)}


class TestAdmissions(AdmissionTests):
    @pytest.fixture(params=sorted(SMALL), autouse=True)
    def chosen(self, request):
        self.name = request.param

    def make(self):
        return SMALL[self.name]()


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"'never' is not one of {', '.join(sorted(ADMISSIONS))}"):
        make_admission("never")


@pytest.mark.parametrize("name", sorted(ADMISSIONS))
@pytest.mark.parametrize("make", [key_of, str, int, lambda number: Named(key_of(number))])
def test_what_is_asked_for_again_and_again_is_kept(name, make):
    admission = make_admission(name)
    for _ in range(3):
        answers = [admission.admit(make(number), 2, 3.0) for number in range(20)]
    assert all(answers)


ANSWERS = """
from ragkv.policies import ADMISSIONS, make_admission
for name in sorted(ADMISSIONS):
    admission = make_admission(name)
    keys = [b"%d" % (i * i % 997) if i % 2 else str(i % 701) for i in range(4000)]
    print(name, [int(admission.admit(key, 1 + i % 5, 1 + i % 7)) for i, key in enumerate(keys)])
"""


def test_answers_are_the_same_in_every_process():
    told = told_by_seeds(ANSWERS)
    assert told[0] == told[1] and len(told[0]) == len(ADMISSIONS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SecondSight(0), "remembered = 0; allowed: 1 or more"),
        (lambda: Frequency(remembered=0), "remembered = 0; allowed: 1 or more"),
        (lambda: Frequency(least=16), "least = 16; allowed: 1 to 15"),
        (lambda: Costly(1.0), r"share = 1.0; allowed: above 0 and below 1"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_second_sight_keeps_what_it_saw_and_still_remembers():
    admission = SecondSight(remembered=3)
    assert [admission.admit(key) for key in (1, 2, 1, 3, 4)] == [False, False, True, False, False]
    assert [admission.admit(key) for key in (1, 2)] == [True, False], "2 was forgotten for 4"


def test_frequency_keeps_what_was_asked_for_often_of_late():
    admission = Frequency(remembered=1024, least=3)
    assert [admission.admit("often") for _ in range(4)] == [False, False, True, True]
    for number in range(2 * 1024):  # two halvings
        admission.admit(number)
    assert not admission.admit("often")


def test_frequency_takes_few_new_keys_for_known_ones():
    admission = Frequency(remembered=1024)
    assert sum(admission.admit(number) for number in range(20_000)) < 20_000 / 30


def test_costly_keeps_what_costs_most_for_its_weight():
    admission = Costly(share=0.25)
    asked = [(1 + number % 8, 10.0) for number in range(4000)]  # eight densities, equally often
    kept = [admission.admit(number, weight, cost) for number, (weight, cost) in enumerate(asked)]
    late = list(zip(asked, kept, strict=True))[2000:]
    shares = [sum(k for (w, _), k in late if w == weight) / 250 for weight in range(1, 9)]
    assert shares[:5] == [1.0] * 5 and shares[-1] == 0.0
    assert 0.15 < 1 - sum(shares) / 8 < 0.35


def test_costly_follows_when_everything_gets_dearer():
    admission = Costly()
    for number in range(200):
        admission.admit(number, 1, 1.0)
    for number in range(1000):
        admission.admit(number, 1, 100.0)
    assert not admission.admit("as cheap as before", 1, 1.0)
    assert admission.admit("as dear as the others", 1, 100.0)
