// Live refresh, and nothing else: fetches this page again and takes over the panels that changed. Without it the page is
// as complete, and as old as its last load.
const EVERY_MS = 5000;

// What somebody is in the middle of must not go away under them.
function isBusy(panel) {
  const selected = document.getSelection();
  if (panel.matches(":hover") || panel.contains(document.activeElement)) return true;
  return Boolean(selected && !selected.isCollapsed && panel.contains(selected.anchorNode));
}

function takeOver(fresh) {
  for (const panel of document.querySelectorAll("[data-live]")) {
    const found = fresh.getElementById(panel.id);
    if (!found || isBusy(panel) || found.outerHTML === panel.outerHTML) continue;
    for (const [number, details] of panel.querySelectorAll("details").entries()) {
      const same = found.querySelectorAll("details")[number];
      if (same) same.open = details.open;
    }
    panel.replaceWith(document.importNode(found, true));
  }
}

async function refresh() {
  if (document.visibilityState === "visible") {
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" }, redirect: "error" });
      if (answer.ok) takeOver(new DOMParser().parseFromString(await answer.text(), "text/html"));
      document.documentElement.dataset.live = answer.ok ? "yes" : "no";
    } catch {
      document.documentElement.dataset.live = "no"; // the server is away; the ages on the page stay as they were
    }
  }
  setTimeout(refresh, EVERY_MS);
}

if (document.querySelector("[data-live]")) setTimeout(refresh, EVERY_MS);
document.documentElement.dataset.ready = "yes";
