"""Models of JAX and scikit-learn, by way of ONNX."""

import os
import warnings

import numpy as np
import pytest

from tests.frontends.onnx.test_capture import check, floats

os.environ.setdefault("JAX_PLATFORMS", "cpu")

weights = [np.random.default_rng(i).normal(size=(16, 16)).astype(np.float32) / 4 for i in range(4)]


def attention(x):
    import jax
    import jax.numpy as jnp

    batch, length, _ = x.shape
    q, k, v = ((x @ w).reshape(batch, length, 2, 8).transpose(0, 2, 1, 3) for w in weights[:3])
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(8)
    seen = jnp.tril(jnp.ones((length, length), bool))
    mixed = jax.nn.softmax(jnp.where(seen, scores, -1e9), -1) @ v
    return x + mixed.transpose(0, 2, 1, 3).reshape(batch, length, 16) @ weights[3]


def perceptron(x):
    import jax

    return jax.nn.gelu(x @ weights[0]) @ weights[1]


def normalised(x):
    import jax.numpy as jnp

    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def recurrent(x):
    import jax
    import jax.numpy as jnp

    def step(state, row):
        state = jnp.tanh(state @ weights[0] + row)
        return state, state

    return jax.lax.scan(step, jnp.zeros((x.shape[0], 16)), x.swapaxes(0, 1))[1]


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (attention, ("B", 6, 16)),
        (attention, ("B", "N", 16)),
        (perceptron, ("B", 16)),
        (normalised, ("B", 16)),
        (recurrent, ("B", 5, 16)),
    ],
)
def test_functions_of_jax(function, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax2onnx = pytest.importorskip("jax2onnx")
        made = jax2onnx.to_onnx(function, [shape])
    sizes = [{"B": batch, "N": length} for batch, length in ((2, 7), (5, 4))]
    given = [floats(*(known.get(n, n) for n in shape)) for known in sizes]
    compiled = check(made, *({made.graph.input[0].name: x} for x in given))
    assert "python" not in compiled.program.metadata


def pipelines():
    from sklearn import ensemble, linear_model, neighbors, pipeline, preprocessing

    scaler, polynomials = preprocessing.StandardScaler, preprocessing.PolynomialFeatures
    return {
        "logistic regression": [scaler(), polynomials(2), linear_model.LogisticRegression()],
        "forest": [preprocessing.MinMaxScaler(), ensemble.RandomForestClassifier(8)],
        "boosted trees": [scaler(), ensemble.GradientBoostingClassifier(n_estimators=8)],
        "neighbours": [scaler(), neighbors.KNeighborsClassifier(3)],
        "forest of numbers": [scaler(), ensemble.RandomForestRegressor(8)],
    } | {"make": pipeline.make_pipeline}


@pytest.mark.parametrize(
    "kind",
    ["logistic regression", "forest", "boosted trees", "neighbours", "forest of numbers"],
)
def test_pipelines_of_scikit_learn(kind):
    """Labels and probabilities, or numbers, of three classes."""
    skl2onnx = pytest.importorskip("skl2onnx")
    made = pipelines()
    x = floats(60, 4)
    y = (x.sum(1) > 0).astype(int) + (x[:, 0] > 1)
    trained = made["make"](*made[kind]).fit(x, y)
    options = {"zipmap": False} if hasattr(trained, "classes_") else None
    check(skl2onnx.to_onnx(trained, x[:1], options=options), {"X": x}, {"X": x[:7]})
