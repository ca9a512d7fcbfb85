"""LoRA on a small network: Linear(10, 50), ReLU, Linear(50, 1), rank 4 on both layers.
Only A and B train, beside the frozen W: y = x W + ((x A) * scale) B.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxlora

keys = jax.random.split(jax.random.key(0), 4)
x, y = jax.random.normal(keys[0], (100, 10)), jax.random.normal(keys[1], (100, 1))
model = nn.Sequential([nn.Dense(50), nn.relu, nn.Dense(1)])
params = model.init(keys[2], x)
lora = jaxlora.init(keys[3], params, jaxlora.LoraConfig(rank=4, targets=r".*kernel"))
apply = jaxlora.lora_apply(model.apply)  # takes `lora` where the model takes its params
print(jaxlora.summary(lora))
trainable, frozen = jaxlora.partition(lora)
tx = optax.adam(0.01)
opt_state = tx.init(trainable)


@jax.jit
def step(trainable, opt_state):
    loss = lambda t: jnp.mean((apply(jaxlora.combine(t, frozen), x) - y) ** 2)  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(trainable)
    updates, opt_state = tx.update(gradient, opt_state)
    return optax.apply_updates(trainable, updates), opt_state, value


for epoch in range(100):
    trainable, opt_state, value = step(trainable, opt_state)
    if epoch % 20 == 0 or epoch == 99:
        print(f"epoch {epoch:2d}  mean squared error {value:.4f}")

tuned = jaxlora.combine(trainable, frozen)
merged = model.apply(jaxlora.merge(tuned), x)
print(f"merged minus factored: {jnp.abs(merged - apply(tuned, x)).max():.1e} at most")
