// Sorts and filters the audit gallery. Without it the pictures stand by epoch, the newest first.
(() => {
  const gallery = document.getElementById("gallery");
  if (!gallery) return;
  const controls = document.getElementById("controls");
  const buttons = [...controls.querySelectorAll("[data-sort]")];
  const filters = [...controls.querySelectorAll("[data-filter]")];
  const cards = [...gallery.children];
  let key = "epoch", down = true;

  const value = (card) => (card.dataset[key] === "" ? null : Number(card.dataset[key]));

  // What is missing comes last, whichever way the rest is sorted; equals keep the order of the page.
  const order = (one, other) => {
    const [a, b] = [value(one), value(other)];
    if (a === null || b === null) return (a === null) - (b === null);
    return down ? b - a : a - b;
  };

  const show = () => {
    for (const button of buttons) {
      const chosen = button.dataset.sort === key;
      button.setAttribute("aria-pressed", chosen);
      button.querySelector(".arrow").textContent = chosen ? (down ? " ↓" : " ↑") : "";
    }
    for (const card of cards) {
      card.hidden = filters.some((filter) => filter.value !== "" && card.dataset[filter.dataset.filter] !== filter.value);
    }
    const sorted = [...cards].sort(order);
    gallery.append(...sorted);
    const shown = cards.filter((card) => !card.hidden).length;
    const first = key === "epoch" ? (down ? "newest" : "oldest") : (down ? "highest" : "lowest");
    document.getElementById("told").textContent = `${shown} of ${cards.length} pictures, by ${key}, ${first} first`;
  };

  for (const button of buttons) {
    button.addEventListener("click", () => {
      down = button.dataset.sort === key ? !down : true;
      key = button.dataset.sort;
      show();
    });
  }
  for (const filter of filters) filter.addEventListener("change", show);
  controls.hidden = false;
  show();
})();
