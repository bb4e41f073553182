// The sampler's arithmetic, as chapters 01, 03, 04 and 09 derive it. Numbers of the schedule are
// doubles, images are Float32Array, one image after another. Steps count from 0.

// Python's rounding: halves go to the even neighbour.
function round(x) {
  const low = Math.floor(x), rest = x - low;
  return rest > 0.5 || (rest === 0.5 && low % 2) ? low + 1 : low;
}

// K of T steps, evenly spaced, both ends included.
export function spaced(T, K) {
  const stride = (T - 1) / (K - 1), kept = [];
  for (let i = 0, at = 0; i < K; i++, at += stride) kept.push(round(at));
  return kept;
}

// The schedule of a chain that visits only the steps `kept` (Eq. 19), as tables.
export function respaced(alphaBar, tModel, kept) {
  const ab = kept.map(t => alphaBar[t]), before = [1, ...ab.slice(0, -1)];
  const beta = ab.map((a, k) => 1 - a / before[k]);
  const tilde = beta.map((b, k) => b * (1 - before[k]) / (1 - ab[k]));   // Eq. 10
  return { kept, ab, before, beta, tilde, clipped: [tilde[1], ...tilde.slice(1)],
           time: kept.map(t => tModel[t]) };
}

// x_t of clean images (Eq. 9).
export function noised(ab, x0, eps) {
  const a = Math.sqrt(ab), b = Math.sqrt(1 - ab);
  return x0.map((x, i) => a * x + b * eps[i]);
}

// The logarithm of the variance of the reverse step: fixed, or learned (Eq. 15).
function logVariance(s, k, v, variance) {
  const low = Math.log(s.clipped[k]);
  if (variance === "beta_tilde") return low;
  if (variance === "beta") return k ? Math.log(s.beta[k]) : low;
  return v * Math.log(s.beta[k]) + (1 - v) * low;
}

// One step from x at step k: `out` is what the network says of x (eps_hat of all pixels of an
// image, then u of all), `noise` is standard normal. Returns x_{k-1}, x0_hat and v.
export function step(s, k, out, x, noise, { method, variance, eta }) {
  const [ab, before] = [s.ab[k], s.before[k]], size = 64;
  const scale = 1 / Math.sqrt(ab), spread = Math.sqrt(1 / ab - 1);
  const w0 = Math.sqrt(before) * s.beta[k] / (1 - ab);                   // Eq. 11
  const wt = Math.sqrt(1 - s.beta[k]) * (1 - before) / (1 - ab);
  const var_ = eta ** 2 * s.tilde[k], kept = Math.sqrt(Math.max(1 - before - var_, 0));
  const next = new Float32Array(x.length), x0 = new Float32Array(x.length);
  const v = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) {
    const at = 2 * size * Math.floor(i / size) + i % size;
    v[i] = (out[at + size] + 1) / 2;
    x0[i] = Math.min(Math.max(scale * x[i] - spread * out[at], -1), 1);
    if (method === "ddim") {
      const eps = (scale * x[i] - x0[i]) / spread;                       // that of the clipped x0
      next[i] = Math.sqrt(before) * x0[i] + kept * eps + Math.sqrt(var_) * noise[i];
    } else {
      const deviation = k ? Math.exp(logVariance(s, k, v[i], variance) / 2) : 0;
      next[i] = w0 * x0[i] + wt * x[i] + deviation * noise[i];
    }
  }
  return { x: next, x0, v };
}

// The chain from step `from` to 0. `net(x, time)` gives the output, `noise(k)` what is added at
// step k; `seen(k, moment)` is told of every step, and ends the chain by returning false.
export async function chain(net, s, x, how, noise, seen, from = s.ab.length - 1) {
  for (let k = from; k >= 0; k--) {
    const moment = step(s, k, await net(x, s.time[k]), x, noise(k), how);
    if ((await seen(k, { ...moment, from: x })) === false) return null;
    x = moment.x;
  }
  return x;
}

// Standard normal numbers that depend on nothing but the seed (mulberry32, Box and Muller).
export function normals(seed) {
  let state = (seed * 2654435761) >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let z = Math.imul(state ^ (state >>> 15), state | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return (((z ^ (z >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
  return n => Float32Array.from({ length: n }, () =>
    Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
}

// On the arc between two noises: it has the length of noise everywhere.
export function between(a, b, share) {
  const angle = share * Math.PI / 2;
  return a.map((x, i) => Math.cos(angle) * x + Math.sin(angle) * b[i]);
}
