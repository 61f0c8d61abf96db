// One job's progress, live. The stream is the quick way; where it breaks or is refused, polling carries on.

import { call } from "./calls.js";
import { finished } from "./words.js";

const POLL_MS = 2000;
// After this many polls the stream is tried again.
const POLLS_BEFORE_STREAM = 5;

/**
 * Calls `onJob(job)` with every change until the job ends, `onConnection(alive)` when the connection goes and comes,
 * `onError(refused)` where the service refuses to tell. Returns a function that stops it.
 */
export function follow(id, { onJob, onConnection, onError }) {
  const path = `/v1/jobs/${id}`;
  let job = null;
  let stream = null;
  let timer = 0;
  let stopped = false;

  function stop() {
    stopped = true;
    stream?.close();
    clearTimeout(timer);
  }

  function hear(told) {
    if (stopped) return;
    job = told;
    onConnection(true);
    if (finished(job)) stop();
    onJob(job);
  }

  function listen() {
    stream = new EventSource(`${path}/events`);
    const onEvent = (event) => hear({ ...job, ...JSON.parse(event.data) });
    for (const name of ["status", "progress", "done"]) stream.addEventListener(name, onEvent);
    stream.addEventListener("open", () => onConnection(true));
    stream.addEventListener("error", () => {
      if (stopped) return;
      onConnection(false);
      // Still CONNECTING: the browser tries again by itself and says where it left off.
      if (stream.readyState === EventSource.CLOSED) poll(POLLS_BEFORE_STREAM);
    });
  }

  async function poll(left) {
    if (stopped) return;
    try {
      hear(await call("GET", path));
    } catch (refused) {
      if (refused.status >= 400 && refused.status < 500 && refused.status !== 429) {
        stop();
        onError(refused);
        return;
      }
      onConnection(false);
    }
    if (stopped) return;
    if (left === 0) listen();
    else timer = setTimeout(() => poll(left - 1), POLL_MS);
  }

  // First the whole job, so that there is something to show at once, then what changes.
  poll(0);
  return stop;
}
