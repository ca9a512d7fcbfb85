"""LoRA on a small network: Linear(10, 50), ReLU, Linear(50, 1); rank 4 on both layers.

Only A and B train, beside the frozen W: y = x W + ((x A) * scale) B. Run: python examples/quickstart.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxlora

data_key, init_key, lora_key = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(data_key, (100, 10))
y = jax.random.normal(jax.random.fold_in(data_key, 1), (100, 1))

model = nn.Sequential([nn.Dense(50), nn.relu, nn.Dense(1)])
params = model.init(init_key, x)

config = jaxlora.LoraConfig(rank=4, targets=r".*kernel")
lora = jaxlora.init(lora_key, params, config)
print(jaxlora.summary(lora))

apply = jaxlora.lora_apply(model.apply)  # takes `lora` where the model takes its params
trainable, frozen = jaxlora.partition(lora)
tx = optax.adam(0.01)
opt_state = tx.init(trainable)


@jax.jit
def step(trainable, opt_state):
    def loss(trainable):
        return jnp.mean((apply(jaxlora.combine(trainable, frozen), x) - y) ** 2)

    value, gradient = jax.value_and_grad(loss)(trainable)
    updates, opt_state = tx.update(gradient, opt_state)
    return optax.apply_updates(trainable, updates), opt_state, value


for epoch in range(100):
    trainable, opt_state, value = step(trainable, opt_state)
    if epoch % 20 == 0 or epoch == 99:
        print(f"epoch {epoch:3d}  mean squared error {value:.4f}")

tuned = jaxlora.combine(trainable, frozen)
difference = jnp.max(jnp.abs(model.apply(jaxlora.merge(tuned), x) - apply(tuned, x)))
print(f"merged minus factored: {difference:.1e} at most")
