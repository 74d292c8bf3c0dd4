(() => {
  const PAGE = 20;
  const { models, datasets, texts, rows } = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("filters");
  const list = document.getElementById("rows");
  const pagers = document.querySelectorAll(".pager");
  const blank = document.getElementById("row").content.firstElementChild;
  const [MODEL, DATASET, PROMPT, BASELINE, ANSWER, PREFERENCE, LONG, SHORT, NUMBER] = Array(9).keys();
  let shown = rows;
  let page = 0;
  let lowered = null; // made when somebody searches for the first time

  const verdict = (row) => {
    if (row[PREFERENCE] === null) return "missing";
    return row[PREFERENCE] > 1.5 ? "won" : row[PREFERENCE] < 1.5 ? "lost" : "draw";
  };
  const longer = (row) => row[LONG] - row[SHORT];
  const byPreference = (sign) => (a, b) => {
    if (a[PREFERENCE] === null || b[PREFERENCE] === null) return (a[PREFERENCE] === null) - (b[PREFERENCE] === null);
    return sign * (b[PREFERENCE] - a[PREFERENCE]);
  };
  const orders = {
    longer: (a, b) => longer(b) - longer(a),
    shorter: (a, b) => longer(a) - longer(b),
    best: byPreference(1),
    worst: byPreference(-1),
  };

  const facts = (row) => {
    const difference = longer(row);
    const parts = ["prompt " + row[NUMBER]];
    if (row[DATASET] >= 0) parts.push(datasets[row[DATASET]]);
    if (row[PREFERENCE] !== null) parts.push("preference " + row[PREFERENCE].toFixed(3));
    if (difference === 0) parts.push("both answers are equally long");
    else {
      const word = difference > 0 ? "longer" : "shorter";
      parts.push(`the model's answer is ${Math.abs(difference)} characters ${word}`);
    }
    return parts.join(" · ");
  };

  const article = (row) => {
    const made = blank.cloneNode(true);
    const slot = (name) => made.querySelector(`[data-slot="${name}"]`);
    const [model, against] = models[row[MODEL]];
    const content = { model, name: model, against, verdict: verdict(row), facts: facts(row) };
    for (const [name, column] of [["prompt", PROMPT], ["baseline", BASELINE], ["answer", ANSWER]]) {
      content[name] = row[column] < 0 ? "(not in the files)" : texts[row[column]];
    }
    for (const [name, text] of Object.entries(content)) slot(name).textContent = text;
    slot("verdict").classList.add(content.verdict);
    return made;
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    list.replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map(article));
    document.getElementById("count").textContent = `${shown.length} of ${rows.length} rows`;
    for (const pager of pagers) {
      pager.hidden = pages === 1;
      pager.querySelector(".place").textContent = `page ${page + 1} of ${pages}`;
      pager.querySelector('[data-step="-1"]').disabled = page === 0;
      pager.querySelector('[data-step="1"]').disabled = page === pages - 1;
    }
  };

  const filter = () => {
    const wanted = Object.fromEntries(new FormData(form));
    const text = wanted.text.trim().toLowerCase();
    if (text) lowered ??= texts.map((entry) => entry.toLowerCase());
    const found = text && lowered.map((entry) => entry.includes(text));
    const same = (value, column, row) => !value || Number(value) === row[column];
    shown = rows.filter(
      (row) =>
        same(wanted.model, MODEL, row) &&
        same(wanted.dataset, DATASET, row) &&
        (!wanted.verdict || verdict(row) === wanted.verdict) &&
        (!text || found[row[PROMPT]] || found[row[BASELINE]] || found[row[ANSWER]]),
    );
    if (wanted.order) shown.sort(orders[wanted.order]);
    page = 0;
    draw();
  };

  let waiting;
  form.addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, event.target.type === "search" ? 150 : 0);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const pager of pagers) {
    pager.addEventListener("click", (event) => {
      const step = Number(event.target.dataset.step);
      if (!step) return;
      page += step;
      draw();
      const title = document.getElementById("answers-title"); // the reading place: also where the pressed button is gone
      title.scrollIntoView();
      title.focus({ preventScroll: true });
    });
  }
  form.hidden = false;
  filter(); // also with what a browser keeps in the form over a reload
})();
