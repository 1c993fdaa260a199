// Asks for the page again every few seconds and shows what has changed.
// A box that is ticked, and a page that is not looked at, are left alone.
const EVERY_MS = 5000;
const live = document.getElementById("live");
let shown = null;
let asks = false;

async function refresh() {
  // a page of a long run may take longer than the interval
  if (asks || document.hidden || live.querySelector("input:checked")) return;
  asks = true;
  try {
    await show();
  } finally {
    asks = false;
  }
}

async function show() {
  const answer = await fetch(location.href, { cache: "no-store" });
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.getElementById("live").innerHTML;
  if (fresh !== shown) live.innerHTML = shown = fresh;
}

setInterval(refresh, EVERY_MS);
