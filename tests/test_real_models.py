"""Models of other packages, unmodified; `benchmarks/real_models.py` says what is checked.

Those of small pure packages are in the `test` extra. The others are skipped unless they are
installed, with the `real-models` extra.
"""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from benchmarks.real_models import MODELS, Model, check, difference

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

# What has no adapter though it is a matrix: sums and products with activations, elementwise.
LEFT = {
    "ViT": {"cls_token", "position_embeddings"},
    "mixture of experts": {"pos_emb"},
    "Mamba-3": {"B_bias", "C_bias"},
    "Mamba-3, MIMO": {"B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"},
    "graph attention": {"att"},
}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(m, id=m.name, marks=[] if m.quick else [pytest.mark.slow])
        for m in MODELS.values()
    ],
)
def test_real_model(model: Model):
    pytest.importorskip(model.module, reason=f"python -m pip install {model.requirement!r}")
    report = check(model)
    assert not report.failures
    assert {path.rpartition("/")[2] for path in report.left} == LEFT.get(model.name, set())
    assert report.linear <= set(report.adapted)
    # Whisper stops the gradient of its sinusoids itself.
    assert all("embed_positions" in path for path in report.idle)


def test_the_check_finds_what_is_wrong():
    one = jnp.ones(3)
    assert difference(one, one) == 0
    assert difference(one * 1.001, one) > 9e-4
    assert difference(jnp.array([1.0, jnp.nan]), jnp.array([1.0, jnp.nan])) == float("inf")
