"""The switches beyond the lecture in plain PyTorch, each from its paper: what jaxgpt's are compared with.

One function of jaxgpt's parameters, {path: tensor}, and of the fields of its configuration as a plain dict. It repeats
keys and values for the queries that share them, turns pairs of channels as complex numbers, and looks at each pair of
tokens to see whether one attends to the other: nothing is shared with jaxgpt's way.
"""

import math

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: x.clamp(min=0) ** 2,  # So et al. 2021
    "silu": lambda x: x * torch.sigmoid(x),
}


def rms_norm(x, eps, scale=None):
    """Zhang and Sennrich 2019, equation 4, with eps below the root as in Llama."""
    x = x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps)
    return x if scale is None else x * scale


def normalised(c, params, path, x):
    """The norm of the stream that the configuration names."""
    scale, bias = params.get((*path, "scale")), params.get((*path, "bias"))
    if c["norm"] == "none":
        return x
    if c["norm"] == "rmsnorm":
        return rms_norm(x, c["norm_eps"], scale)
    return F.layer_norm(x, x.shape[-1:], scale, bias, c["norm_eps"])


def frequencies(c, D):
    """The angle of each pair per token: Su et al. 2021, section 3.2.2, and the two ways of stretching it."""
    found = []
    for i in range(D // 2):
        frequency = c["rope_theta"] ** (-2 * i / D)
        wavelength = 2 * math.pi / frequency
        if c["rope_scaling"] == "linear":
            frequency /= c["rope_factor"]
        if c["rope_scaling"] == "llama3":  # as published with the models
            low, high = c["rope_low_freq"], c["rope_high_freq"]
            if wavelength > c["rope_original_size"] / low:
                frequency /= c["rope_factor"]
            elif wavelength >= c["rope_original_size"] / high:
                smooth = (c["rope_original_size"] / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / c["rope_factor"] + smooth * frequency
        found.append(frequency)
    return torch.tensor(found, dtype=torch.float64)


def turned(c, x):
    """Each pair of channels, i and i + D/2, as a complex number, times e^(i position frequency): (..., T, D)."""
    T, D = x.shape[-2:]
    pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    angles = torch.arange(T, dtype=torch.float64)[:, None] * frequencies(c, D)
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def linear(params, path, x):
    """A layer whose matrix is (in, out)."""
    y = x @ params[*path, "kernel"]
    return y + params[*path, "bias"] if (*path, "bias") in params else y


def attention(c, params, path, x, tokens, documents):
    """Vaswani et al. 2017; one head of keys and values for several of queries: Ainslie et al. 2023."""
    B, T, _ = x.shape
    H, K = c["n_head"], c["n_kv_head"] or c["n_head"]
    D = c["head_size"] or c["n_embd"] // H
    q, k, v = (linear(params, (*path, name), x) for name in ("query", "key", "value"))
    if c["value_embeddings"]:
        v = v + F.embedding(tokens, params[*path, "value_embedding_table", "embedding"])
    q, k, v = (a.view(B, T, -1, D).transpose(1, 2) for a in (q, k, v))
    if c["qk_norm"]:
        q = rms_norm(q, c["norm_eps"], params.get((*path, "query_norm", "scale")))
        k = rms_norm(k, c["norm_eps"], params.get((*path, "key_norm", "scale")))
    if c["positions"] == "rope":
        q, k = turned(c, q), turned(c, k)
    k, v = (a.repeat_interleave(H // K, dim=1) for a in (k, v))
    scores = q @ k.mT / math.sqrt(D)
    hidden = torch.zeros(B, 1, T, T, dtype=torch.bool)
    for query in range(T):
        for key in range(T):
            outside = key > query or (c["sliding_window"] and query - key >= c["sliding_window"])
            hidden[:, 0, query, key] = bool(outside)
            if documents is not None:
                hidden[:, 0, query, key] |= documents[:, query] != documents[:, key]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    out = (weights @ v).transpose(1, 2).reshape(B, T, H * D)
    return linear(params, (*path, "proj"), out)


def feed_forward(c, params, path, x):
    """With a gate: Shazeer 2020, equation 6."""
    up, activation = linear(params, (*path, "fc"), x), ACTIVATIONS[c["activation"]]
    inner = activation(linear(params, (*path, "gate"), x)) * up if c["gated"] else activation(up)
    return linear(params, (*path, "proj"), inner)


def logits(c, params, tokens, documents=None):
    """The logits of each position: (B, T) -> (B, T, V)."""
    x = F.embedding(tokens, params["token_embedding_table", "embedding"])
    if c["positions"] == "learned":
        x = x + params["position_embedding_table", "embedding"][: tokens.shape[1]]
    if c["embedding_norm"]:
        x = normalised(c, params, ("embedding_norm",), x)
    for i in range(c["n_layer"]):
        at = ("blocks", i)
        x = x + attention(c, params, (*at, "attn"), normalised(c, params, (*at, "ln_1"), x), tokens, documents)
        if c["mlp_ratio"]:
            x = x + feed_forward(c, params, (*at, "mlp"), normalised(c, params, (*at, "ln_2"), x))
    x = normalised(c, params, ("ln_f",), x)
    if c["lm_head"] == "tied":
        out = x @ params["token_embedding_table", "embedding"].mT
    else:
        out = linear(params, ("lm_head",), x)
    return c["logit_softcap"] * torch.tanh(out / c["logit_softcap"]) if c["logit_softcap"] else out
