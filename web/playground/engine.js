// A chain as one call: `run(asked, seen)` gives the last images, and null if another chain was
// asked for meanwhile.
export class Engine {
  constructor() {
    this.id = 0;
    this.waiting = new Map();
    this.worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    this.ready = new Promise((resolve, reject) => {
      this.worker.onmessage = ({ data }) => {
        if (data.ready) return resolve(data.about);
        if (data.error && data.id === undefined) return reject(new Error(data.error));
        this.told(data);
      };
      this.worker.onerror = e => reject(new Error(e.message || "the worker did not start"));
    });
  }

  told(data) {
    const asked = this.waiting.get(data.id);
    if (!asked) return;
    if (data.error) asked.reject(new Error(data.error));
    else if (!data.done) return asked.seen(data);
    else asked.resolve(data);
    this.waiting.delete(data.id);
  }

  run(asked, seen = () => {}) {
    for (const other of this.waiting.values()) other.resolve(null);
    this.waiting.clear();
    const id = ++this.id;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { seen, resolve, reject });
      this.worker.postMessage({ id, ...asked });
    });
  }
}
