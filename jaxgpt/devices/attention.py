"""Fused attention kernels: the causal attention of `model.Attention` without the (T, T) weights in memory.

The kernels have no dropout and no key/value cache, and cuDNN's takes no documents. Where these are needed, the model
uses its own code. CPUs have no kernel; there the model's code is called for a part of the queries at a time.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgpt.devices import chips

Kernel = Literal["auto", "xla", "cudnn", "splash"]
TILE = 128  # splash attention needs T to be a multiple of this
PARTS = 4  # of the queries, on a CPU; more would save little and make XLA compile longer
SHORT = 64  # queries that are not divided


def choose(kernel: Kernel, platform: str, dtype: jnp.dtype, block_size: int, head_size: int) -> Kernel:
    """Resolve `auto`: the platform's fused kernel if it takes the sizes and the dtype, otherwise xla.

    Args:
        kernel: as configured; anything but auto is returned unchanged.
        platform: JAX's name for it: cpu, gpu or tpu.
        dtype: dtype of the computation.
        block_size: T, in tokens.
        head_size: D.
    """
    if kernel != "auto":
        return kernel
    found = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "xla")
    too_small = found == "splash" and head_size % 64  # for a TPU's matrix unit
    return found if fits(found, dtype, block_size, head_size) and not too_small else "xla"


def fits(kernel: Kernel, dtype: jnp.dtype, block_size: int, head_size: int) -> bool:
    """Whether a fused kernel takes the sizes and the dtype; its platform is another question.

    Args:
        kernel: any; xla is not fused.
        dtype: dtype of the computation; the cuDNN kernel takes half precision only.
        block_size: T, in tokens.
        head_size: D.
    """
    if kernel == "cudnn":
        half = dtype in (jnp.bfloat16, jnp.float16)
        # its gradient is summed in another order each time; with XLA's flag against that, compiling it fails
        usable = not chips.is_old_gpu() and not chips.has_repeatable_sums()
        return half and head_size % 8 == 0 and head_size <= 128 and usable
    return kernel == "splash" and block_size % TILE == 0


def causal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kernel: Kernel,
    plain: Callable[..., jax.Array],
    window: int = 0,
    documents: jax.Array | None = None,
) -> jax.Array:
    """Compute scaled causal attention for all heads, with a fused kernel where one can be used.

    The kernel is chosen for this call: by its sizes and dtype, and when the program is lowered, by its platform. So a
    model can be called anywhere, whatever it was trained with.

    Args:
        q: (B, H, T, D) floating.
        k: (B, K, T, D) of the same dtype, each head for H / K heads of q.
        v: same shape and dtype as k.
        kernel: as configured. cudnn runs on NVIDIA GPUs, splash on TPUs (on a CPU it is interpreted, which is slow).
        plain: computes the same from q, k, v and, if there are any, documents, anywhere. It takes fewer queries too,
            whose first one is at `start`.
        window: number of keys that a query sees, its own included; 0 = all before it.
        documents: (B, T) integers; a query sees only keys of its own document. None = all are one.

    Returns:
        (B, H, T, D) in the dtype of q.

    Source: Dao et al. 2022, "FlashAttention".
    """
    chex.assert_rank(q, 4)
    chex.assert_equal_shape([k, v])
    T, D = q.shape[2:]
    given = (q, k, v) if documents is None else (q, k, v, documents)
    kernel = choose(kernel, jax.default_backend(), q.dtype, T, D)
    if not fits(kernel, q.dtype, T, D) or (kernel == "cudnn" and documents is not None):
        if T <= SHORT or documents is not None:
            return plain(*given)
        return jax.lax.platform_dependent(q, k, v, cpu=functools.partial(_in_parts, plain=plain), default=plain)
    if kernel == "cudnn":
        try:
            return jax.lax.platform_dependent(q, k, v, cuda=functools.partial(_cudnn, window=window), default=plain)
        except RuntimeError:  # jax asks this machine for its cuDNN while it traces
            return plain(q, k, v)
    splash = functools.partial(_splash, plain=plain, window=window)
    # XLA's partitioner cannot split a kernel, so each device runs it on its own part of the batch and of the heads
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return splash(*given)
    batch = ("data", "fsdp") if q.shape[0] % math.prod(mesh.shape[axis] for axis in ("data", "fsdp")) == 0 else None
    split = P(batch, "tensor")
    parts = (split,) * 3 + (P(batch),) * (documents is not None)
    return jax.shard_map(splash, in_specs=parts, out_specs=split, check_vma=False)(*given)


def _in_parts(q, k, v, plain):
    """The same, for some queries at a time, which need no scores of later keys: 5/8 of all scores."""
    T = q.shape[2]
    size = max(SHORT, -(-T // PARTS))
    ends = [min(start + size, T) for start in range(0, T, size)]
    parts = [
        plain(q[:, :, start:end], k[:, :, :end], v[:, :, :end], start=start)
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return jnp.concatenate(parts, axis=2)


def _cudnn(q, k, v, window):
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))  # (B, T, H, D)
    options = {"is_causal": True, "implementation": "cudnn"}
    if window:
        options["local_window_size"] = (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, **options).swapaxes(1, 2)


def _splash(q, k, v, documents=None, *, plain, window):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import

    _, H, T, D = q.shape
    kernel, interpreted = (jax.vmap(_splash_kernel(H, T, window, interpret)) for interpret in (False, True))

    def scaled(kernel):
        def run(q, k, v, *documents):
            segments = [splash.SegmentIds(*[ids.astype(jnp.int32)] * 2) for ids in documents]
            return kernel((q * D**-0.5).astype(q.dtype), k, v, *segments)

        return run

    given = (q, k, v) if documents is None else (q, k, v, documents)
    return jax.lax.platform_dependent(*given, tpu=scaled(kernel), cpu=scaled(interpreted), default=plain)


def _splash_kernel(H: int, T: int, window: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in (512, 256, TILE) if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    seen = splash.LocalMask((T, T), (window - 1, 0), 0) if window else splash.CausalMask((T, T))
    mask = splash.MultiHeadMask([seen] * H)
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
