"""Fused attention kernels: the causal attention of `model.Attention` without the (T, T) weights in memory.

The kernels have no dropout and no key/value cache. Where these are needed, the model uses its own code.
"""

import math
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgpt.errors import ArgumentError

Kernel = Literal["auto", "xla", "cudnn", "splash"]
TILE = 128  # splash attention needs T to be a multiple of this


def choose(kernel: Kernel, platform: str, dtype: jnp.dtype, block_size: int, head_size: int) -> Kernel:
    """Resolve `auto`: the platform's fused kernel if it supports the sizes and the dtype, otherwise xla.

    Args:
        kernel: as configured; anything but auto is returned unchanged.
        platform: JAX's name for it: cpu, gpu or tpu.
        dtype: dtype of the computation; the cuDNN kernel supports half precision only.
        block_size: T, in tokens.
        head_size: D.
    """
    if kernel != "auto":
        return kernel
    if platform == "gpu" and dtype == jnp.bfloat16 and head_size % 8 == 0 and head_size <= 128:
        return "cudnn"
    if platform == "tpu" and block_size % TILE == 0 and head_size % 64 == 0:
        return "splash"
    return "xla"


def causal(q: jax.Array, k: jax.Array, v: jax.Array, kernel: Literal["cudnn", "splash"]) -> jax.Array:
    """Compute scaled causal attention for all heads with a fused kernel.

    Args:
        q: (B, H, T, D) floating.
        k: same shape and dtype as q.
        v: same shape and dtype as q.
        kernel: `cudnn` (NVIDIA GPU, half precision) or `splash` (TPU, T a multiple of `TILE`; elsewhere interpreted).

    Returns:
        (B, H, T, D) in the dtype of q.

    Raises:
        ValueError: the kernel does not run on this machine or with these sizes.

    Source: Dao et al. 2022, "FlashAttention".
    """
    chex.assert_rank(q, 4)
    chex.assert_equal_shape([q, k, v])
    if kernel == "cudnn":
        q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))  # (B, T, H, D)
        try:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn").swapaxes(1, 2)
        except RuntimeError as error:
            raise ArgumentError(f"no cuDNN attention here ({error}): use --model.attention auto") from error
    # XLA's partitioner cannot split a kernel, so each device runs it on its own part of the batch and of the heads
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _splash(q, k, v)
    batch = ("data", "fsdp") if q.shape[0] % math.prod(mesh.shape[axis] for axis in ("data", "fsdp")) == 0 else None
    split = P(batch, "tensor")
    return jax.shard_map(_splash, in_specs=(split,) * 3, out_specs=split, check_vma=False)(q, k, v)


def _splash(q, k, v):
    _, H, T, D = q.shape
    kernel, plain = (jax.vmap(_splash_kernel(H, T, interpret)) for interpret in (False, True))
    return jax.lax.platform_dependent((q * D**-0.5).astype(q.dtype), k, v, tpu=kernel, default=plain)


def _splash_kernel(H: int, T: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import

    if T % TILE:
        raise ArgumentError(
            f"splash attention needs a window length that is a multiple of {TILE}, not {T}: use --model.attention xla"
        )
    block = next(size for size in (512, 256, TILE) if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * H)
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
