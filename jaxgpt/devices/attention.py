"""Fused attention kernels: the causal attention of `model.Attention` without the (T, T) weights in memory.

The kernels have no dropout and no key/value cache. Where these are needed, the model uses its own code.
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
        return (
            dtype in (jnp.bfloat16, jnp.float16) and head_size % 8 == 0 and head_size <= 128 and not chips.is_old_gpu()
        )
    return kernel == "splash" and block_size % TILE == 0


def causal(q: jax.Array, k: jax.Array, v: jax.Array, kernel: Kernel, plain: Callable[..., jax.Array]) -> jax.Array:
    """Compute scaled causal attention for all heads, with a fused kernel where one can be used.

    The kernel is chosen for this call: by its sizes and dtype, and when the program is lowered, by its platform. So a
    model can be called anywhere, whatever it was trained with.

    Args:
        q: (B, H, T, D) floating.
        k: same shape and dtype as q.
        v: same shape and dtype as q.
        kernel: as configured. cudnn runs on NVIDIA GPUs, splash on TPUs (on a CPU it is interpreted, which is slow).
        plain: computes the same from q, k and v, anywhere.

    Returns:
        (B, H, T, D) in the dtype of q.

    Source: Dao et al. 2022, "FlashAttention".
    """
    chex.assert_rank(q, 4)
    chex.assert_equal_shape([q, k, v])
    T, D = q.shape[2:]
    kernel = choose(kernel, jax.default_backend(), q.dtype, T, D)
    if not fits(kernel, q.dtype, T, D):
        return plain(q, k, v)
    if kernel == "cudnn":
        try:
            return jax.lax.platform_dependent(q, k, v, cuda=_cudnn, default=plain)
        except RuntimeError:  # jax asks this machine for its cuDNN while it traces
            return plain(q, k, v)
    splash = functools.partial(_splash, plain=plain)
    # XLA's partitioner cannot split a kernel, so each device runs it on its own part of the batch and of the heads
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return splash(q, k, v)
    batch = ("data", "fsdp") if q.shape[0] % math.prod(mesh.shape[axis] for axis in ("data", "fsdp")) == 0 else None
    split = P(batch, "tensor")
    return jax.shard_map(splash, in_specs=(split,) * 3, out_specs=split, check_vma=False)(q, k, v)


def _cudnn(q, k, v):
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))  # (B, T, H, D)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn").swapaxes(1, 2)


def _splash(q, k, v, plain):
    _, H, T, D = q.shape
    kernel, interpreted = (jax.vmap(_splash_kernel(H, T, interpret)) for interpret in (False, True))

    def scaled(kernel):
        return lambda q, k, v: kernel((q * D**-0.5).astype(q.dtype), k, v)

    return jax.lax.platform_dependent(q, k, v, tpu=scaled(kernel), cpu=scaled(interpreted), default=plain)


def _splash_kernel(H: int, T: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import

    block = next(size for size in (512, 256, TILE) if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * H)
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
