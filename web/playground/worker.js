// The network lives here, so that the page stays quick while a chain runs.
import * as ort from "./ort.wasm.min.mjs";
import { chain, normals, respaced, spaced } from "./sampler.js";

ort.env.wasm.numThreads = 1;             // more would need headers that few servers send
ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;

let current = 0;
const pause = () => new Promise(done => {
  const channel = new MessageChannel();  // sooner than a timer
  channel.port1.onmessage = done;
  channel.port2.postMessage(0);
});

const loaded = (async () => {
  const [about, session] = await Promise.all([
    fetch(new URL("digits.json", import.meta.url)).then(r => r.json()),
    ort.InferenceSession.create(new URL("digits.onnx", import.meta.url).href)]);
  return { about, session };
})();

async function network(x, time) {
  const { session } = await loaded, n = x.length / 64;
  const { out } = await session.run({
    x: new ort.Tensor("float32", x, [n, 1, 8, 8]),
    t: new ort.Tensor("float32", new Float32Array(n).fill(time), [n]) });
  return out.data;
}

// What is asked: steps, how, x (where to begin), from (of the kept steps), seed or the noises.
async function run(asked) {
  const { about } = await loaded, { id, steps, how, x, seed, noises } = asked;
  const s = respaced(about.alpha_bar, about.t_model, spaced(about.alpha_bar.length, steps));
  const draw = normals(seed ?? 0), none = new Float32Array(x.length);
  const quiet = how.method === "ddim" && !how.eta;
  const noise = k => noises ? noises[k] : quiet ? none : draw(x.length);
  const started = performance.now();
  const end = await chain(network, s, x, how, noise, async (k, moment) => {
    if (id !== current) return false;
    postMessage({ id, k, ...moment, t: s.kept[k], ms: performance.now() - started });
    await pause();
  }, asked.from);
  if (end) postMessage({ id, done: true, x: end, ms: performance.now() - started });
}

onmessage = ({ data }) => {
  current = data.id;
  run(data).catch(e => postMessage({ id: data.id, error: String(e) }));
};
loaded.then(({ about }) => postMessage({ ready: true, about }),
            e => postMessage({ error: String(e) }));
