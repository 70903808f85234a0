"use strict";
// The model of a run in plain JavaScript: model.py with what it takes from layers.py, then sampling.py and tokenizer.py,
// for one text and one token at a time. It runs in a web worker; screen.js shows what it computes.
//
// T query time, S key time, C channels, H heads, K heads of keys and values, D head size, V vocabulary, as in model.py.
// A matrix is (O, I), row after row: an output is the product of one row, which lies in one piece, with the input.

// The layers, as in layers.py.

function product(matrix, x) { // (O, I), (I,) -> (O,)
  const I = x.length, O = matrix.length / I, y = new Float32Array(O);
  let o = 0;
  for (; o + 4 <= O; o += 4) { // four rows at a time, so that x is read once for all of them
    const p = o * I, q = p + I, r = q + I, s = r + I;
    let a = 0, b = 0, c = 0, d = 0;
    for (let i = 0; i < I; i++) {
      const value = x[i];
      a += matrix[p + i] * value;
      b += matrix[q + i] * value;
      c += matrix[r + i] * value;
      d += matrix[s + i] * value;
    }
    y[o] = a, y[o + 1] = b, y[o + 2] = c, y[o + 3] = d;
  }
  for (; o < O; o++) y[o] = dot(matrix, o * I, x, 0, I);
  return y;
}

function dot(a, i, b, j, n) { // of n values of a from place i on, and of b from place j on
  let total = 0;
  for (let k = 0; k < n; k++) total += a[i + k] * b[j + k];
  return total;
}

function add(x, y) {
  const sum = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) sum[i] = x[i] + y[i];
  return sum;
}

const unchanged = (x) => x; // in place of a layer that is switched off
const replace = (stream, branch) => branch;
const row = (table, i, C) => table.subarray(i * C, (i + 1) * C);

function linear(weights, name) { // (I,) -> (O,)
  const kernel = weights.get(`${name}.kernel`), bias = weights.get(`${name}.bias`);
  if (!kernel) return unchanged; // without projections
  return bias ? (x) => add(product(kernel, x), bias) : (x) => product(kernel, x);
}

function layerNorm(eps, scale, bias) { // (C,) -> (C,)
  return (x) => {
    const C = x.length, y = new Float32Array(C);
    let mean = 0, variance = 0;
    for (let i = 0; i < C; i++) mean += x[i] / C;
    for (let i = 0; i < C; i++) variance += (x[i] - mean) ** 2 / C;
    const factor = 1 / Math.sqrt(variance + eps);
    for (let i = 0; i < C; i++) y[i] = (x[i] - mean) * factor * (scale ? scale[i] : 1) + (bias ? bias[i] : 0);
    return y;
  };
}

function rmsNorm(eps, scale, C) { // (n C,) -> (n C,), each C of them on their own
  return (x) => {
    const y = new Float32Array(x.length);
    for (let start = 0; start < x.length; start += C) {
      const factor = 1 / Math.sqrt(dot(x, start, x, start, C) / C + eps);
      for (let i = 0; i < C; i++) y[start + i] = x[start + i] * factor * (scale ? scale[i] : 1);
    }
    return y;
  };
}

function norm(config, weights, name) {
  const scale = weights.get(`${name}.scale`), bias = weights.get(`${name}.bias`);
  if (config.norm === "none") return unchanged;
  return config.norm === "rmsnorm"
    ? rmsNorm(config.norm_eps, scale, config.width)
    : layerNorm(config.norm_eps, scale, bias);
}

function rotation(frequencies, D) { // (n D,) queries or keys, and their position; channel i is paired with i + D/2
  return (heads, position) => {
    const turned = new Float32Array(heads.length);
    for (let i = 0; i < D / 2; i++) {
      const angle = Math.fround(position * frequencies[i]); // in float32, as in layers.py
      const cos = Math.cos(angle), sin = Math.sin(angle);
      for (let a = i, b = i + D / 2; a < heads.length; a += D, b += D) {
        turned[a] = heads[a] * cos - heads[b] * sin;
        turned[b] = heads[b] * cos + heads[a] * sin;
      }
    }
    return turned;
  };
}

const ACTIVATIONS = {
  relu: (x) => Math.max(x, 0),
  gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  relu2: (x) => Math.max(x, 0) ** 2,
  silu: (x) => x / (1 + Math.exp(-x)),
};

function erf(x) { // within 1.2e-7: Press et al., "Numerical recipes", section 6.2
  const t = 1 / (1 + 0.5 * Math.abs(x));
  const high = 0.27886807 + t * (-1.13520398 + t * (1.48851587 + t * (-0.82215223 + t * 0.17087277)));
  const power = -1.26551223 + t * (1.00002368 + t * (0.37409196 + t * (0.09678418 + t * (-0.18628806 + t * high))));
  const rest = t * Math.exp(power - x * x);
  return x < 0 ? rest - 1 : 1 - rest;
}

function softmax(scores) {
  const weights = new Float32Array(scores.length);
  let largest = -Infinity, total = 0;
  for (let i = 0; i < scores.length; i++) largest = Math.max(largest, scores[i]);
  for (let i = 0; i < scores.length; i++) total += weights[i] = Math.exp(scores[i] - largest);
  for (let i = 0; i < scores.length; i++) weights[i] /= total;
  return weights;
}

// The model, as in model.py.

class Attention { // the tokens communicate
  constructor(config, weights, name) {
    this.H = config.n_head, this.K = config.kv_heads, this.D = config.channels_per_head;
    this.S = config.block_size, this.span = config.span;
    this.query = linear(weights, `${name}.query`);
    this.key = linear(weights, `${name}.key`);
    this.value = linear(weights, `${name}.value`);
    this.proj = linear(weights, `${name}.proj`);
    const headNorm = (which) => rmsNorm(config.norm_eps, weights.get(`${name}.${which}.scale`), this.D);
    this.queryNorm = config.qk_norm ? headNorm("query_norm") : unchanged;
    this.keyNorm = config.qk_norm ? headNorm("key_norm") : unchanged;
    this.rotate = config.frequencies ? rotation(Float32Array.from(config.frequencies), this.D) : unchanged;
    this.valueTable = weights.get(`${name}.value_embedding_table.embedding`);
    this.keys = new Float32Array(this.S * this.K * this.D); // the cache: the token at position p is at place p mod S
    this.values = new Float32Array(this.S * this.K * this.D);
  }

  call(x, position, token) { // (C,) -> (C,)
    const { H, K, D, S } = this;
    const q = this.rotate(this.queryNorm(this.query(x)), position); // (H D,)
    const k = this.rotate(this.keyNorm(this.key(x)), position); // (K D,)
    let v = this.value(x);
    if (this.valueTable) v = add(v, row(this.valueTable, token, K * D));
    this.keys.set(k, (position % S) * K * D);
    this.values.set(v, (position % S) * K * D);
    const first = Math.max(position + 1 - this.span, 0), out = new Float32Array(H * D);
    this.weights = []; // of each head, for the keys from `first` on
    for (let h = 0; h < H; h++) {
      const group = Math.floor((h * K) / H) * D; // heads that share keys lie next to each other
      const place = (i) => ((first + i) % S) * K * D + group;
      const scores = new Float32Array(position + 1 - first);
      for (let i = 0; i < scores.length; i++) scores[i] = dot(q, h * D, this.keys, place(i), D) / Math.sqrt(D);
      const weights = softmax(scores);
      for (let i = 0; i < weights.length; i++) {
        const start = place(i);
        for (let d = 0; d < D; d++) out[h * D + d] += weights[i] * this.values[start + d];
      }
      this.weights.push(weights);
    }
    return this.proj(out);
  }
}

class MLP { // each token computes on its own
  constructor(config, weights, name) {
    this.fc = linear(weights, `${name}.fc`);
    this.activation = ACTIVATIONS[config.activation];
    this.proj = linear(weights, `${name}.proj`);
    this.gate = config.gated ? linear(weights, `${name}.gate`) : null;
  }

  call(x) { // (C,) -> (C,)
    const { activation, gate } = this, hidden = this.fc(x), gates = gate ? gate(x) : hidden;
    for (let i = 0; i < hidden.length; i++) hidden[i] = activation(gates[i]) * (gate ? hidden[i] : 1);
    return this.proj(hidden);
  }
}

class Block { // communication, then computation
  constructor(config, weights, name) {
    this.ln1 = norm(config, weights, `${name}.ln_1`);
    this.attn = new Attention(config, weights, `${name}.attn`);
    this.ln2 = norm(config, weights, `${name}.ln_2`);
    this.mlp = config.mlp_ratio ? new MLP(config, weights, `${name}.mlp`) : null;
    this.join = config.residual ? add : replace;
  }

  call(x, position, token) { // (C,) -> (C,)
    x = this.join(x, this.attn.call(this.ln1(x), position, token));
    return this.mlp ? this.join(x, this.mlp.call(this.ln2(x))) : x;
  }
}

class GPT { // from tokens to the logits of the next one
  constructor(config, weights) {
    this.config = config;
    this.tokenTable = weights.get("token_embedding_table.embedding");
    this.positionTable = weights.get("position_embedding_table.embedding");
    this.blocks = Array.from({ length: config.n_layer }, (_, i) => new Block(config, weights, `blocks.${i}`));
    this.lnF = norm(config, weights, "ln_f");
    this.embeddingNorm = config.embedding_norm ? norm(config, weights, "embedding_norm") : unchanged;
    const tied = (x) => product(this.tokenTable, x);
    this.head = { none: unchanged, tied, linear: linear(weights, "lm_head") }[config.lm_head];
    const bound = config.logit_softcap;
    this.softcap = bound ? (logits) => logits.map((value) => bound * Math.tanh(value / bound)) : unchanged;
    this.length = 0; // tokens in the cache
  }

  embed(token, position) {
    const x = row(this.tokenTable, token, this.config.width);
    return this.embeddingNorm(this.positionTable ? add(x, row(this.positionTable, position, x.length)) : x);
  }

  call(token) { // -> the (V,) logits of the token after it
    const position = this.length++;
    let x = this.embed(token, position);
    for (const block of this.blocks) x = block.call(x, position, token);
    return this.softcap(this.head(this.lnF(x)));
  }
}

// How a text is made, as in sampling.py.

class Context { // the tokens of a text that the model still sees
  constructor(model, tokens) {
    this.model = model, this.tokens = [...tokens];
    this.rolls = model.config.positions === "rope";
  }

  async push(token) { // -> the logits of the token after it
    this.tokens.push(token);
    const { model } = this, size = model.config.block_size;
    if (this.rolls || model.length < size) return model.call(token);
    model.length = 0; // the window slides: positions are learned, so a token that moves gets new keys and values
    let logits;
    for (const each of this.tokens.slice(-size)) {
      logits = model.call(each);
      await pause();
    }
    return logits;
  }
}

const kthLargest = (values, k) => Float32Array.from(values).sort()[Math.max(values.length - k, 0)];
const argmax = (values) => values.reduce((best, value, i) => (value > values[best] ? i : best), 0);

function filterLogits(logits, { temperature, topK }) { // the tokens to draw from; the others get -Infinity
  const least = topK ? kthLargest(logits, topK) : -Infinity;
  return logits.map((value) => (value < least ? -Infinity : value / temperature));
}

function sample(logits, rule, random) { // the argmax of logits plus Gumbel noise is a draw from the softmax
  if (rule.temperature <= 0) return argmax(logits);
  return argmax(filterLogits(logits, rule).map((value) => value - Math.log(-Math.log(random()))));
}

function randomNumbers(seed) { // in [0, 1): Mulberry32; not the numbers of jax
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

// Text to tokens and back, as in tokenizer.py.

const utf8 = new TextEncoder();

class CharTokenizer {
  constructor({ alphabet }) {
    const characters = Array.from(alphabet);
    this.ids = new Map(characters.map((character, i) => [character, i]));
    this.bytes = characters.map((character) => utf8.encode(character));
  }

  encode(text) {
    return Array.from(text, (character) => {
      if (this.ids.has(character)) return this.ids.get(character);
      throw new Error(`The model does not know the character ${JSON.stringify(character)}.`);
    });
  }
}

const PIECES = // GPT-2's; \s has other characters in JavaScript
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const isVisible = (byte) => (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
const hidden = Array.from({ length: 256 }, (_, byte) => byte).filter((byte) => !isVisible(byte));
const CHARACTERS = Array.from({ length: 256 }, (_, byte) =>
  String.fromCharCode(isVisible(byte) ? byte : 256 + hidden.indexOf(byte)));
const BYTES = new Map(CHARACTERS.map((character, byte) => [character, byte]));

class BPETokenizer {
  constructor({ tokens, merges, added, matched, whole }) {
    this.ids = new Map(tokens.map((token, i) => [token, i]));
    this.ranks = new Map(merges.map((pair, rank) => [pair, rank]));
    this.whole = whole;
    this.added = new Map(added);
    const longest = matched.sort((a, b) => b.length - a.length); // of several added tokens at a place
    const escaped = longest.map((token) => token.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
    this.between = escaped.length ? new RegExp(`(${escaped.join("|")})`, "u") : null;
    this.bytes = tokens.map((token) => {
      const known = Array.from(token ?? "", (character) => BYTES.get(character));
      return known.includes(undefined) ? utf8.encode(token) : Uint8Array.from(known);
    });
    for (const [token, i] of added) this.bytes[i] = utf8.encode(token);
  }

  encode(text) {
    const parts = this.between ? text.split(this.between) : [text]; // every second one is an added token
    return parts.flatMap((part, i) =>
      i % 2 ? [this.added.get(part)] : (part.match(PIECES) ?? []).flatMap((piece) => this.merged(piece)));
  }

  merged(piece) {
    const parts = Array.from(utf8.encode(piece), (byte) => CHARACTERS[byte]);
    if (this.whole && this.ids.has(parts.join(""))) return [this.ids.get(parts.join(""))];
    for (;;) {
      let best = Infinity, place = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`);
        if (rank < best) [best, place] = [rank, i];
      }
      if (place < 0) return parts.map((part) => this.ids.get(part));
      parts.splice(place, 2, parts[place] + parts[place + 1]);
    }
  }
}

// What screen.js asks for. The weights and the tokenizer are there once `load` was called.

let run, weights, tokenizer;
const jobs = new Map(); // those that can be stopped, by their number

function bytesOf(base64) { // page.py has padded them to a multiple of 12
  const bytes = new Uint8Array((base64.length / 4) * 3), piece = 1 << 20; // a text of all bytes would need much memory
  for (let i = 0; i < base64.length; i += piece) {
    const text = atob(base64.slice(i, i + piece));
    for (let j = 0; j < text.length; j++) bytes[(i / 4) * 3 + j] = text.charCodeAt(j);
  }
  return bytes.buffer;
}

function widened(halves) { // float16 -> float32
  const values = Float32Array.from({ length: 1 << 16 }, (_, half) => {
    const sign = half >> 15 ? -1 : 1, exponent = (half >> 10) & 31, fraction = (half & 1023) / 1024;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
  });
  const wide = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) wide[i] = values[halves[i]];
  return wide;
}

function label(id) { // a token as text, also if it is a part of a character
  const bytes = tokenizer.bytes[id] ?? [];
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(bytes));
  } catch {
    return `<${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(" ")}>`;
  }
}

function reader() { // -> a function that makes what the page shows of a token, which was read after these logits
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return (id, logits) => {
    const text = decoder.decode(Uint8Array.from(tokenizer.bytes[id] ?? []), { stream: true });
    if (!logits) return { id, text, probability: null, top: [] };
    const probabilities = softmax(logits), least = kthLargest(probabilities, 10), top = [];
    probabilities.forEach((probability, i) => probability >= least && top.push({ id: i, probability }));
    top.sort((a, b) => b.probability - a.probability);
    const likeliest = top.slice(0, 10).map((each) => ({ ...each, text: label(each.id) }));
    return { id, text, probability: probabilities[id], top: likeliest };
  };
}

let due = 0;
async function pause() { // now and then, let messages arrive
  if (performance.now() < due) return;
  await new Promise((resolve) => setTimeout(resolve));
  due = performance.now() + 40;
}

const METHODS = {
  load({ base64, ...rest }) {
    run = rest.run;
    const bytes = bytesOf(base64); // little endian, as every current machine with a browser
    const values = run.dtype === "float16" ? widened(new Uint16Array(bytes)) : new Float32Array(bytes);
    let start = 0;
    weights = new Map(run.tensors.map(([name, size]) => [name, values.subarray(start, (start += size))]));
    tokenizer = run.tokenizer.alphabet ? new CharTokenizer(run.tokenizer) : new BPETokenizer(run.tokenizer);
  },

  encode: ({ text }) => tokenizer.encode(text),

  async complete({ text, maxNewTokens = 100, temperature = 1, topK = 0, seed = 1337 }, job) {
    const prompt = text ? tokenizer.encode(text) : run.tokenizer.start;
    const model = new GPT(run.config, weights), read = reader(), random = randomNumbers(seed);
    const seen = model.config.positions === "rope" ? 0 : Math.max(prompt.length - model.config.block_size, 0);
    const context = new Context(model, prompt.slice(0, seen));
    let logits = null, written = "";
    for (const [i, token] of prompt.entries()) {
      job.show(read(token, logits));
      if (i >= seen) logits = await context.push(token);
      await pause();
    }
    for (let n = 0; n < maxNewTokens && !job.stopped; n++) {
      const token = sample(logits, { temperature, topK }, random);
      if (token === run.tokenizer.end) break;
      const shown = read(token, logits);
      written += shown.text;
      job.show(shown);
      if (n + 1 < maxNewTokens) logits = await context.push(token);
      await pause();
    }
    return written;
  },

  async logits({ text }) { // (T, V)
    const model = new GPT(run.config, weights), rows = [];
    for (const token of fitting(tokenizer.encode(text))) {
      rows.push(model.call(token).slice());
      await pause();
    }
    return rows;
  },

  async attention({ tokens, layer }) { // (H, T, T), one after the other
    const T = fitting(tokens).length, model = new GPT(run.config, weights);
    const matrices = new Float32Array(model.config.n_head * T * T);
    for (const [t, token] of tokens.entries()) {
      model.call(token);
      model.blocks[layer].attn.weights.forEach((row, h) => matrices.set(row, (h * T + t) * T + t + 1 - row.length));
      await pause();
    }
    return matrices;
  },

  async predict({ tokens }, job) { // in consecutive windows, as `jaxgpt eval` reads a split
    const model = new GPT(run.config, weights), read = reader();
    let logits = null;
    for (const [i, token] of tokens.entries()) {
      if (job.stopped) return;
      job.show(read(token, logits));
      if (i % model.config.block_size === 0) model.length = 0;
      logits = model.call(token);
      await pause();
    }
  },
};

function fitting(tokens) {
  const size = run.config.block_size;
  if (tokens.length <= size) return tokens;
  throw new Error(`${tokens.length} tokens do not fit block_size ${size}: pass only the last ones`);
}

onmessage = async ({ data: { id, method, args } }) => {
  if (method === "stop") {
    if (jobs.has(args)) jobs.get(args).stopped = true;
    return;
  }
  const job = { stopped: false, show: (shown) => postMessage({ id, shown }) };
  jobs.set(id, job);
  try {
    postMessage({ id, result: await METHODS[method](args, job) });
  } catch (error) {
    postMessage({ id, error: error.message });
  }
  jobs.delete(id);
};
