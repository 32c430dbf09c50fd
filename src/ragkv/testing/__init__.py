"""Conformance suites: what every implementation of a contract of ragkv must do, as classes of tests.

A package that brings a store or a policy of its own subclasses a suite, says how one is made, and inherits all
tests. The suites demand what the docstrings of the contract say, and nothing else. They are no abstract classes,
since pytest passes over those without a word:

    ragkv.testing.stores       `StoreTests`        of `ragkv.kvstore.stores.contract.Store`
    ragkv.testing.policies     `PolicyTests`       of `ragkv.policies.EvictionPolicy`
    ragkv.testing.admission    `AdmissionTests`    of `ragkv.policies.AdmissionPolicy`

They need pytest and hypothesis: `pip install ragkv[testing]`. Nothing else of ragkv imports this package.
"""

import pytest

pytest.register_assert_rewrite("ragkv.testing.admission", "ragkv.testing.policies", "ragkv.testing.stores")
