# %% [markdown]
# # Watching a router learn
#
# A Mixture-of-Experts layer sends each token to a few of its experts; a small *router* decides to which.
# The loss says whether the whole model learns. It says little about the router: experts can learn well
# enough behind a router that chooses at random.
#
# This notebook trains a Nano-MoE, a small GPT with four experts, on real text, and six rules watch its
# router. Then we break the router on purpose, to see who notices.
#
# It needs `pip install 'moe-rules-callback[flax,plot]'`, no network and no accelerator. Everything runs in
# about a minute on two CPU cores.

# %%
import math
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from IPython.display import display

from moe_rules_callback import RuleAuditCallback, evaluate, load_rules, parse_rule

# %matplotlib inline

# %% [markdown]
# ## The text
#
# Three kinds of text that come with Python: its language reference, its standard library, and its tables of
# character codes. A token is a byte, and each sequence is of one kind, so there is something for experts to
# specialise in.

# %%
library = Path(sysconfig.get_path("stdlib"))
prose = "\n".join(topics[name] for name in sorted(topics)).encode()
code = b"\n".join(path.read_bytes() for path in sorted(library.glob("*.py")))
tables = b"\n".join(path.read_bytes() for path in sorted(library.glob("encodings/cp*.py")))
texts = [np.frombuffer(text, np.uint8) for text in (prose, code, tables)]


def draw(rng: np.random.Generator, batch: int = 8, context: int = 64) -> np.ndarray:
    """Random windows of the three texts: int32 [batch, context + 1]."""
    windows = []
    for kind in rng.integers(len(texts), size=batch):
        start = rng.integers(len(texts[kind]) - context)
        windows.append(texts[kind][start : start + context + 1])
    return np.stack(windows).astype(np.int32)


print(", ".join(f"{len(text):,} bytes" for text in texts))

# %% [markdown]
# ## The model
#
# Two blocks of attention and experts. Every token goes to its two best experts, and what they answer is
# weighted by the router's probabilities. That weight is the only way by which the router learns from the
# text. `starved=True` cuts it; we will need this later.

# %%
WIDTH, HEADS, EXPERTS, TOP_K, LAYERS, CONTEXT = 48, 4, 4, 2, 2, 64


class MoE(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, starved: bool):
        small, init = nnx.initializers.normal(0.02), nnx.initializers.lecun_normal(batch_axis=0)
        self.starved = starved
        self.router = nnx.Linear(WIDTH, EXPERTS, use_bias=False, kernel_init=small, rngs=rngs)
        self.w_in = nnx.Param(init(rngs.params(), (EXPERTS, WIDTH, 2 * WIDTH)))
        self.w_out = nnx.Param(init(rngs.params(), (EXPERTS, 2 * WIDTH, WIDTH)))

    def __call__(self, x):  # [B, T, D]
        probs = jax.nn.softmax(self.router(x))  # [B, T, E]
        if self.starved:
            probs = jax.lax.stop_gradient(probs)
        gate, chosen = jax.lax.top_k(probs, TOP_K)  # [B, T, k] each
        weight = (gate[..., None] * jax.nn.one_hot(chosen, EXPERTS)).sum(-2)  # [B, T, E], 0 if not chosen
        hidden = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, self.w_in[...]))
        return jnp.einsum("bte,btef,efd->btd", weight, hidden, self.w_out[...]), probs


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, starved: bool):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.moe = MoE(rngs, starved)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x), mask=mask)
        y, probs = self.moe(self.norm2(x))
        return x + y, probs


class NanoMoE(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, starved: bool = False):
        self.tokens = nnx.Embed(256, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs, starved) for _ in range(LAYERS)])
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, tokens):  # [B, T]
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        router_probs = {}
        for i, block in enumerate(self.blocks):
            x, router_probs[f"block_{i}"] = block(x, mask)
        return self.head(self.norm(x)), router_probs


# %% [markdown]
# The training step is the usual one. It returns the loss and the router's probabilities, which the audit
# will want. A balancing loss keeps all experts at work.


# %%
@nnx.jit
def train_step(model, optimizer, tokens):
    def loss_fn(model):
        logits, router_probs = model(tokens[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        balance = sum(balancing_loss(probs) for probs in router_probs.values()) / LAYERS
        return loss + 0.01 * balance, (loss, router_probs)

    (_, (loss, router_probs)), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return loss, router_probs


def balancing_loss(probs):
    """1 where all experts are the first choice equally often (Fedus et al. 2021, equation 4)."""
    share = jax.nn.one_hot(probs.argmax(-1), EXPERTS).mean((0, 1))
    return EXPERTS * jnp.sum(share * probs.mean((0, 1)))


# %% [markdown]
# ## Six rules, and a seventh
#
# The book `nano_moe` holds six rules. Each is a formula over fuzzy predicates such as
# `high_routing_confidence`, with a threshold before the `::`. Two of them are risks and can fire; the others
# are only watched.

# %%
six = load_rules("nano_moe").rules
display(*six)

# %% [markdown]
# The seventh we write ourselves. It asks a sharper question: does the choice of an expert depend on the
# token at all? A signal for it is shipped, the mutual information of token and expert.

# %%
blind = parse_rule(
    "0.75 :: always[8](low_router_mutual_information)",
    "blind_router",
    kind="risk",
    warmup=100,
    description="Which expert is chosen hardly depends on the token, however balanced the loads are.",
    cause="The router gets no gradient, or the balancing loss outweighs the model's loss.",
    next_step="Look at router_gradient_share: near 0 the router is starved.",
)
rules = [*six, blind]
display(blind)

# %% [markdown]
# ## How to read a rule
#
# The value of a predicate is not a number but an interval [L, U] inside 0..1: its truth is at least L and at
# most U. A rule computes an interval from those of its predicates.

# %%
sure, unsure = (0.92, 0.95), (0.55, 0.95)
for a in (sure, unsure):
    interval, state = evaluate("0.80 :: a & b", {"a": a, "b": sure})
    print(f"a = {a}, b = {sure}:  a & b is [{interval.lower:.2f}, {interval.upper:.2f}], {state.name}")

# %% [markdown]
# Width is uncertainty. A thin interval is a sure answer, whatever the answer is; [0, 1] knows nothing. A
# predicate is least sure where its signal lies near the point that parts high from low, and what one
# predicate does not know, the rule does not know either: here the wide `a` made a wide rule.
#
# The threshold comes last. It leaves the interval as it is and gives it a name: TRUE once L reaches it, FALSE
# once 1 - U does, otherwise UNKNOWN. A stricter threshold makes fewer rules TRUE, never truth itself higher.

# %%
for threshold in (0.7, 0.8, 0.9):
    interval, state = evaluate(f"{threshold} :: a & b", {"a": sure, "b": sure})
    print(f"{threshold} :: a & b  is [{interval.lower:.2f}, {interval.upper:.2f}], {state.name}")

# %% [markdown]
# ## Training, with the audit beside the step
#
# `on_step` takes the loss, the probabilities and the parameters (one rule asks whether weights grow). It does
# not wait for the device. A risk that begins to fire is logged once, in words.


# %%
def train(starved: bool = False, steps: int = 800):
    model = NanoMoE(nnx.Rngs(0), starved)
    schedule = optax.warmup_cosine_decay_schedule(0, 1e-2, 50, steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    with RuleAuditCallback(rules, top_k=TOP_K) as audit:
        for _ in range(steps):
            loss, router_probs = train_step(model, optimizer, draw(rng))
            params = nnx.state(model, nnx.Param)
            audit.on_step({"loss": loss, "router_probs": router_probs, "params": params})
    return audit.history


history = train()

# %% [markdown]
# The history is an `xarray.Dataset` over the step. `truth` holds the intervals, `state` what the thresholds
# make of them, `truth_layer` and `signal_value` the same by layer.

# %%
display(history)

# %% [markdown]
# Whoever prefers one variable for each bound gets `<rule>_L` and `<rule>_U`:

# %%
print(history.moe_rules.to_tutorial())

# %% [markdown]
# ## The picture
#
# The loss above; below, each rule as a line at its upper bound with a band down to its lower one.

# %%
display(history.moe_rules.plot())

# %% [markdown]
# At first routing is chance: `blind_router` and `underutilized_experts` are high. As the router learns they
# fall towards 0, and the rules that speak of confident routing begin to rise. That is the way from chance to
# structure.
#
# Do not read more into it than it says. A rule over both layers is as true as its worse layer, its ramps and
# its threshold are strict, and the run is short: the good news is on its way and hardly ever TRUE.
#
# Here is one rule in detail, with its threshold. It shakes because the loss of small batches does, and
# `stable_loss` is a part of it.

# %%
stability = history.moe_rules.rolling(30).sel(rule="routing_stability")
figure, axes = plt.subplots(figsize=(8, 2.6))
axes.fill_between(
    history.step, *stability.transpose("bound", "step"), alpha=0.4, label="[L, U], mean of 30 rows"
)
axes.axhline(0.80, linestyle="--", color="black", label="threshold")
axes.set(title="routing_stability", xlabel="Step", ylim=(-0.05, 1.05))
axes.legend(loc="upper left")
print("first TRUE at step", history.moe_rules.first_true("routing_stability"))

# %% [markdown]
# The accessor itself shows what the run says about every rule, and where to look:

# %%
display(history.moe_rules)

# %% [markdown]
# Two risks fired. Soon after the warm-up of 100 steps the router of the second block still told tokens apart
# badly; later it did not fire again. `load_imbalance` comes and goes: in a batch of 512 bytes the load is
# never quite even, and the weights are growing.
#
# ## A fault
#
# Now the router is starved: its probabilities still weigh the experts, but no gradient reaches it. It is a
# common bug; forgetting to apply the gate has the same effect. Model, text and seed are as before.

# %%
starved = train(starved=True)

# %%
figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
for name, run in (("learning", history), ("starved", starved)):
    run.loss.rolling(step=30, center=True, min_periods=1).mean().plot(ax=above, label=f"{name} router")
    truth = run.moe_rules["blind_router"]
    below.fill_between(run.step, *truth.transpose("bound", "step"), alpha=0.5, label=f"{name} router")
above.set(title="Loss, rolling mean of 30 rows", xlabel="", ylabel="")
below.set(title="Truth of blind_router", xlabel="Step")
above.legend()
below.legend()
losses = [float(run.loss[-100:].mean()) for run in (history, starved)]
print(f"loss of the last 100 steps: {losses[0]:.3f} learning, {losses[1]:.3f} starved")

# %% [markdown]
# The losses lie so close that nobody would stop the second run; without the first to compare with there is
# nothing to see at all. The experts learn behind a router that does not. The rule tells them apart from the
# first rows that it judges.

# %%
display(starved.moe_rules)

# %%
found = {verdict.rule: verdict for verdict in starved.moe_rules.verdicts()}
display(found["blind_router"])

# %% [markdown]
# ## What the other rules could not say
#
# `load_imbalance` fires more often than before, since the balancing loss does not reach the router either.
# But it fired in the sound run too: that alone proves nothing.
#
# `underutilized_experts` speaks of just this fault, and it stays UNKNOWN. This is no accident. With four
# experts the largest probability is never below 1/4. Even there, the ramp of `high_routing_confidence`, which
# turns at .35 with a slope of 12 and a margin of .05, cannot rule out that confidence is high:

# %%
upper = 1 / (1 + math.exp(-12 * (1 / 4 - (0.35 - 0.05))))
print(f"U of high_routing_confidence is never below {upper:.3f},")
print(f"so L of its opposite is never above {1 - upper:.3f}, and the rule's threshold is .65")

# %% [markdown]
# So with four experts the rule can never become TRUE. One could move the offset until it does. We do not: a
# rule is worth something only if it can also say no. An UNKNOWN that never ends is a hint that a rule asks
# the wrong question, and the audit says so: *never decided*. `blind_router` asks the right one. It looks at
# the mutual information of token and expert, which is 0 for a router at chance, however many experts there
# are.
#
# ## From here
#
# * `RuleAuditCallback(rules, logdir="runs/demo")` writes TensorBoard files and the history to disk;
#   `open_history("runs/demo")` reads it back, also while the run goes on.
# * Without any rules, `RuleAuditCallback()` watches with the whole book `router_health`. It asks the same,
#   and given `params` and `grads` as well it names the illness.
# * `moe-rules plot runs/demo` draws the pictures from the shell.
