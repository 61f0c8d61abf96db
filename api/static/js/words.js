// Numbers and codes in words a person would use. Nothing here touches the page.

export function bytes(count) {
  if (count < 1000) return `${count} bytes`;
  const units = ["kB", "MB", "GB"];
  let power = -1;
  do { count /= 1000; power += 1; } while (count >= 999.5 && power < units.length - 1);
  return `${count < 9.95 ? count.toFixed(1) : Math.round(count)} ${units[power]}`;
}

export function size(width, height) {
  return `${width.toLocaleString("en")} × ${height.toLocaleString("en")} px`;
}

export function megapixels(width, height) {
  const mp = width * height / 1e6;
  return `${mp < 0.95 ? Number(mp.toPrecision(2)) : mp < 9.95 ? mp.toFixed(1) : Math.round(mp).toLocaleString("en")} MP`;
}

export function seconds(count) {
  if (count < 0.0005) return "0 s";
  if (count < 0.9995) return `${Math.round(count * 1000)} ms`;
  if (count < 9.95) return `${count.toFixed(1)} s`;
  if (count < 90) return `${Math.round(count)} s`;
  if (count < 5400) return `${Math.round(count / 60)} min`;
  return `${(count / 3600).toFixed(1)} h`;
}

export function ago(iso) {
  const past = (Date.now() - Date.parse(iso)) / 1000;
  if (past < 10) return "just now";
  if (past < 86400) return `${seconds(Math.max(past, 10))} ago`;
  return new Date(iso).toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });
}

export function percent(share) {
  return share >= 0.995 && share < 1 ? "over 99 %" : share < 0.005 ? "under 1 %" : `${Math.round(share * 100)} %`;
}

const PHASES = {
  queued: "Waiting",
  claimed: "Starting",
  fetch: "Fetching the picture",
  decode: "Reading the picture",
  plan: "Planning",
  load: "Loading the model",
  upscale: "Enlarging",
  classify: "Looking at what it shows",
  encode: "Writing the file",
  store: "Storing the result",
};

/** What a job is doing at this moment, in one line. */
export function step(job) {
  if (job.status === "queued") {
    const again = job.attempt > 0 ? "Will be tried again" : "Waiting";
    if (job.waits_for) return `${again}: ${job.waits_for}`;
    if (job.queue_position === null || job.queue_position === undefined) return again;
    return job.queue_position === 1 ? `${again}: next in the queue` : `${again}: number ${job.queue_position} in the queue`;
  }
  if (job.status !== "running") return status(job);
  if (job.cancel_requested_at) return "Stopping";
  const { phase, bands_done, bands_total, eta_seconds } = job.progress;
  let line = PHASES[phase] ?? "Working";
  if (phase === "upscale" && bands_total > 1) line += `, strip ${Math.min(bands_done + 1, bands_total)} of ${bands_total}`;
  if (eta_seconds !== null && eta_seconds !== undefined && eta_seconds >= 1) line += ` · about ${seconds(eta_seconds)} left`;
  return line;
}

const STATUSES = { queued: "Waiting", running: "Working", succeeded: "Done", failed: "Failed", canceled: "Canceled", expired: "Too late" };

export function status(job) {
  if (job.status === "running" && job.cancel_requested_at) return "Stopping";
  if (job.status === "queued" && job.attempt > 0) return "Trying again";
  return STATUSES[job.status] ?? job.status;
}

export function finished(job) {
  return Boolean(job.finished_at);
}

/** Whether its pictures are still in storage; they are let go some time after the job has ended. */
export function kept(job) {
  return job.expires_at === null || Date.parse(job.expires_at) > Date.now();
}

const ADVICE = {
  "invalid-image": "Open it in a picture editor and save it again, or choose another file.",
  "unsupported-format": "Save it as PNG, JPEG, WebP or TIFF and hand it in again.",
  "input-too-large": "Make the file smaller, or hand in a part of the picture.",
  "output-too-large": "Choose a smaller enlargement.",
  "format-cannot-hold-size": "Choose PNG or TIFF under “Save as”, or a smaller enlargement.",
  "blocked-url": "Download the picture yourself and hand in the file.",
  "fetch-failed": "Download the picture yourself and hand in the file.",
  "model-unavailable": "Choose another model.",
  "deadline-exceeded": "Try again, without a deadline or when the queue is shorter.",
  "out-of-memory": "Try again, or choose a smaller enlargement.",
  "bad-output": "Try again, or choose another model.",
  "worker-lost": "Try again. If it happens once more, tell whoever runs this service.",
  "internal": "Try again. If it happens once more, tell whoever runs this service, with the id of the job.",
  "unauthorized": "Reload the page and sign in again.",
  "forbidden": "Reload the page and sign in again.",
  "queue-full": "Wait until some of your pictures are done.",
  "rate-limited": "Wait a minute and try again.",
  "rendition-not-made": "Try again in a moment.",
  "too-many-streams": "The page asks by itself meanwhile; nothing is lost.",
  "not-found": "Look for it in the list of your pictures.",
  "gone": "Results are kept for a limited time; hand the picture in again.",
  "storage-unavailable": "The service's storage does not answer just now; try again in a minute.",
  "database-unavailable": "The service's database does not answer just now; try again in a minute.",
  "unreachable": "Look at your connection and try again; what was handed in already is safe.",
};

const FIGURES = [
  ["psnr_db", "Likeness when made small again (PSNR)", (value) => `${value.toFixed(1)} dB`],
  ["ssim", "Likeness of structure (SSIM)", (value) => value.toFixed(3)],
  ["colour_difference", "Mean difference of colour (ΔE)", (value) => value.toFixed(2)],
  ["seam_score", "Steps at the seams between tiles (1: none to be seen)", (value) => value.toFixed(2)],
  ["tiles", "Tiles", (value) => value.toLocaleString("en")],
  ["bands_done_again", "Bands computed again", (value) => value.toLocaleString("en")],
];

/** A fidelity report's figures as [name, figure]; what could not be measured is left out. */
export function figures(report) {
  return FIGURES.filter(([key]) => typeof report[key] === "number").map(([key, name, say]) => [name, say(report[key])]);
}

/** What a fidelity report comes to, in a word or two: PSNR is null where nothing differs. */
export function verdict({ psnr_db, colour_difference }) {
  const likeness = psnr_db === null ? "the same when made small again" : `${psnr_db.toFixed(1)} dB when made small again`;
  return typeof colour_difference === "number" ? `${likeness}, colours ΔE ${colour_difference.toFixed(2)}` : likeness;
}

/** How long pictures will take, from the estimates for them; honest about what that is founded on. */
export function estimate(told) {
  const work = told.reduce((sum, { expected_seconds: { p50 } }) => sum + p50, 0);
  const most = told.reduce((sum, { expected_seconds: { p95 } }) => sum + p95, 0);
  const { basis, history_jobs: jobs, queue_wait_seconds: wait, workers } = told[0];
  const lines = [];
  // Milliseconds would pretend to know more than an estimate can.
  const about = (count) => count < 1 ? "a second" : seconds(count);
  if (basis === "history") {
    lines.push(`Takes about ${about(work)}${most > work * 1.3 ? `, seldom more than ${seconds(most)}` : ""}, going by ${jobs === 1 ? "the one picture" : `${jobs} pictures`} made here with this model.`);
  } else {
    lines.push(`Takes roughly ${about(work)}: a guess, since this model has made nothing here yet.`);
  }
  if (workers === 0) lines.push("No worker is running just now: it waits until one is back.");
  else if (wait >= 1) lines.push(`About ${seconds(wait)} of work are waiting before it.`);
  return lines.join(" ");
}

/** What to do next about an error code; empty where there is nothing better to say than the error itself. */
export function advice(code) {
  return ADVICE[code] ?? "";
}

const TIMES = [
  ["queued_seconds", "Waiting"],
  ["fetch_seconds", "Fetching"],
  ["decode_seconds", "Reading"],
  ["load_seconds", "Loading the model"],
  ["upscale_seconds", "Enlarging"],
  ["classify_seconds", "Looking at what it shows"],
  ["encode_seconds", "Writing"],
  ["store_seconds", "Storing"],
];

/** A job's timings as [name, seconds], in the order things happened; what took no time is left out. */
export function times(timings) {
  return TIMES.filter(([key]) => timings[key] >= 0.0005).map(([key, name]) => [name, timings[key]]);
}
