"use strict";
// Reloads the page that `megatron-egrsd watch --page` writes again and again, and says so if it no longer does.
const { every, written, life } = document.body.dataset;
const opened = Date.now();

function duration(exact) {
  const seconds = Math.round(exact);
  const minutes = Math.floor(seconds / 60);
  if (minutes >= 60) return `${Math.floor(minutes / 60)}h${String(minutes % 60).padStart(2, "0")}m`;
  return minutes ? `${minutes}m${String(seconds % 60).padStart(2, "0")}s` : `${seconds}s`;
}

function tick() {
  const now = Date.now();
  const time = document.querySelector(".life time");
  if (time) time.textContent = duration(Math.max(0, now / 1000 - Number(life)));
  if (!Number(every)) return; // the last picture of a run
  document.querySelector(".stale").hidden = now / 1000 - Number(written) < 3 * Number(every) + 30;
  const reading = String(document.getSelection()) || document.hidden;
  if (now - opened >= 1000 * Number(every) && !reading) location.reload();
}

setInterval(tick, 1000);
tick();
