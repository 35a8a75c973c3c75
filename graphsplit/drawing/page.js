// Opens and closes boxes, finds them, zooms, and shows what is known of the one under the pointer.
// Places come from `place` below, which does what layout.py does; rows and ties were made there.
"use strict";
(() => {
  const { boxes: entries, sizes } = JSON.parse(document.getElementById("data").textContent);
  const figure = document.querySelector("svg.graphsplit");
  const canvas = document.getElementById("canvas");
  const details = document.getElementById("details");
  const search = document.getElementById("search");
  const found = document.getElementById("found");

  const boxes = entries.map(([role, known, head, children, nets, rows, ties, content]) => {
    return { role, known, head, children, nets, rows, ties, content, isOpen: false, parent: null };
  });
  for (const box of boxes) {
    box.children = (box.children || []).map((number) => boxes[number]);
    box.children.forEach((child) => (child.parent = box));
  }
  const root = boxes[0];
  const boxOf = new Map();

  // Tie a box to its element, and those in it to theirs, as far as they have one.
  function adopt(box, element) {
    box.element = element;
    boxOf.set(element, box);
    [box.card, box.inside] = element.children;
    if (box.children.length && box !== root) handle(box, box.card);
    if (box.inside) enter(box);
  }

  function enter(box) {
    [box.frame, box.bar] = box.inside.children;
    box.isOpen = box.element.classList.contains("open");
    if (box !== root) handle(box, box.bar);
    const parts = [...box.inside.children].slice(2);
    box.ways = parts.slice(0, box.nets.length);
    parts.slice(box.nets.length).forEach((part, place) => adopt(box.children[place], part));
  }

  function handle(box, element) {
    element.setAttribute("tabindex", "0");
    element.setAttribute("role", "button");
    element.setAttribute("aria-expanded", element === box.bar);
  }

  adopt(root, figure.querySelector(".box"));

  // Layout

  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const text = (value) => value.toFixed(1).replace(/\.0$/, "");
  const list = (map, key) => map.get(key) || map.set(key, []).get(key);

  function curve(x, y, end, bottom) {
    if (Math.abs(end - x) < 0.5) return `M${text(x)} ${text(y)}V${text(bottom)}`;
    const middle = text((y + bottom) / 2);
    return `M${text(x)} ${text(y)}C${text(x)} ${middle} ${text(end)} ${middle} ${text(end)} ${text(bottom)}`;
  }

  function place(box) {
    box.incoming = new Map();
    box.outgoing = new Map();
    if (!box.isOpen) {
      [box.width, box.height] = box.role === "move" ? sizes.pill : sizes.card;
      return;
    }
    box.children.forEach(place);
    const width = (item) => (item >= 0 ? box.children[item].width : sizes.lane);
    const port = (item, net, way) => {
      if (item < 0) return 0;
      const child = box.children[item];
      const x = child[way].get(box.nets[net]);
      return x === undefined ? 0 : x - child.width / 2;
    };
    const at = [];
    const tops = [];
    const bottoms = [];
    let y = sizes.head;
    box.rows.forEach((row, rank) => {
      tops.push(y);
      bottoms.push(y + Math.max(0, ...row.map((item) => (item >= 0 ? box.children[item].height : 0))));
      y = bottoms[rank] + sizes.gap;
      at.push(across(row, rank));
    });

    function across(row, rank) {
      const packed = new Map();
      let x = 0;
      for (const item of row) {
        packed.set(item, x + width(item) / 2);
        x += width(item) + sizes.gap;
      }
      if (rank === 0) return packed;
      const near = new Map();
      const far = new Map();
      for (const [upper, lower, net] of box.ties[rank - 1]) {
        const wish = at[rank - 1].get(upper) + port(upper, net, "outgoing") - port(lower, net, "incoming");
        list(upper >= 0 || rank === 1 ? near : far, lower).push(wish);
      }
      const wishes = new Map([...far, ...near].map(([item, values]) => [item, mean(values)]));
      const wanted = row.filter((item) => item >= 0 && wishes.has(item));
      const guides = wanted.length ? wanted : [...wishes.keys()];
      const shift = guides.length ? mean(guides.map((item) => wishes.get(item) - packed.get(item))) : 0;
      packed.forEach((centre, item) => packed.set(item, centre + shift));
      const isBox = row.map((item) => item >= 0);
      if (!isBox.includes(true)) return packed;
      const room = (item) => width(item) / 2 + sizes.gap + sizes.lane / 2;
      for (let i = isBox.lastIndexOf(true) + 1; i < row.length; i++) {
        packed.set(row[i], Math.max(packed.get(row[i - 1]) + room(row[i - 1]), wishes.get(row[i])));
      }
      for (let i = isBox.indexOf(true) - 1; i >= 0; i--) {
        packed.set(row[i], Math.min(packed.get(row[i + 1]) - room(row[i + 1]), wishes.get(row[i])));
      }
      return packed;
    }

    let left = Infinity;
    let right = -Infinity;
    for (const row of at) {
      row.forEach((x, item) => {
        left = Math.min(left, x - width(item) / 2);
        right = Math.max(right, x + width(item) / 2);
      });
    }
    box.width = Math.max(right - left + 2 * sizes.pad, box.head);
    box.height = bottoms[bottoms.length - 1];
    const shift = (box.width - right - left) / 2;
    at.forEach((row, rank) =>
      row.forEach((x, item) => {
        row.set(item, x + shift);
        if (item >= 0) {
          const child = box.children[item];
          move(child, x + shift - child.width / 2, tops[rank]);
        }
      }),
    );
    at[0].forEach((x, item) => box.incoming.set(box.nets[-1 - item], x));
    at[at.length - 1].forEach((x, item) => box.outgoing.set(box.nets[-1 - item], x));
    const lines = box.nets.map(() => "");
    box.ties.forEach((ties, rank) => {
      const drawn = new Set();
      for (const [upper, lower, net] of ties) {
        const x = at[rank].get(upper) + port(upper, net, "outgoing");
        const start = tops[rank] + (upper >= 0 ? box.children[upper].height : 0);
        if (!drawn.has(net) && start < bottoms[rank]) {
          lines[net] += `M${text(x)} ${text(start)}V${text(bottoms[rank])}`;
        }
        drawn.add(net);
        const end = at[rank + 1].get(lower) + port(lower, net, "incoming");
        lines[net] += curve(x, bottoms[rank], end, tops[rank + 1]);
      }
    });
    box.ways.forEach((way, net) => way.setAttribute("d", lines[net]));
    box.frame.setAttribute("height", text(box.height));
    box.frame.setAttribute("width", text(box.width));
    box.bar.firstElementChild.setAttribute("width", text(box.width));
  }

  function move(box, x, y) {
    box.element.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
  }

  // Open and close

  let scale = 1;

  function resize() {
    const [width, height] = [root.width + 2 * sizes.pad, root.height + 2 * sizes.pad];
    figure.setAttribute("viewBox", `0 0 ${width} ${height}`);
    figure.setAttribute("width", width * scale);
    figure.setAttribute("height", height * scale);
    document.getElementById("scale").textContent = `${Math.round(100 * scale)} %`;
  }

  function set(box, isOpen) {
    if (!box.children.length || box === root) return;
    if (isOpen && !box.inside) {
      box.element.insertAdjacentHTML("beforeend", box.content);
      box.inside = box.element.lastElementChild;
      enter(box);
    }
    box.isOpen = isOpen;
    box.element.classList.toggle("open", isOpen);
    box.element.classList.toggle("closed", !isOpen);
  }

  // Lay out again; the box stays where it is on the screen.
  function refresh(anchor) {
    const before = anchor && anchor.element.getBoundingClientRect();
    place(root);
    move(root, sizes.pad, sizes.pad);
    resize();
    if (before && before.width) {
      const after = anchor.element.getBoundingClientRect();
      canvas.scrollBy(
        after.left + after.width / 2 - before.left - before.width / 2,
        after.top - before.top,
      );
    }
  }

  function toggle(box) {
    set(box, !box.isOpen);
    refresh(box);
    if (document.activeElement.closest(".box")) shown(box).focus({ preventScroll: true });
  }

  const shown = (box) => (box.isOpen ? box.bar : box.card);
  const boxAt = (target) => boxOf.get(target.closest(".box"));

  let dragged = false;
  figure.addEventListener("click", (event) => {
    const box = boxAt(event.target);
    const handle = event.target.closest(".card, .head");
    if (box && handle && box.children.length && box !== root && !dragged) toggle(box);
  });
  figure.addEventListener("keydown", (event) => {
    const box = boxAt(event.target);
    if (box && box.children.length && box !== root && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      toggle(box);
    }
  });
  document.getElementById("open").addEventListener("click", () => {
    boxes.forEach((box) => set(box, true));
    refresh();
  });
  document.getElementById("close").addEventListener("click", () => {
    boxes.forEach((box) => set(box, false));
    refresh();
    canvas.scrollTo(Math.max(0, (canvas.scrollWidth - canvas.clientWidth) / 2), 0);
  });

  // Details of the box under the pointer, and the lines that it has

  function show(box) {
    if (!box) return;
    for (const way of figure.querySelectorAll(".lit")) way.classList.remove("lit");
    const [title, ...rest] = box.known.split("\n");
    details.replaceChildren(document.createElement("h2"), document.createElement("pre"));
    details.firstChild.textContent = title;
    details.lastChild.textContent = rest.join("\n");
    if (!box.parent) return;
    const place = box.parent.children.indexOf(box);
    for (const ties of box.parent.ties) {
      for (const [upper, lower, net] of ties) {
        if (upper === place || lower === place) box.parent.ways[net].classList.add("lit");
      }
    }
  }
  figure.addEventListener("pointerover", (event) => show(boxAt(event.target)));
  figure.addEventListener("focusin", (event) => show(boxAt(event.target)));

  // Search

  let hits = [];
  let hit = -1;
  function mark() {
    const wanted = new Set(hits);
    boxOf.forEach((box, element) => {
      element.classList.toggle("hit", wanted.has(box));
      element.classList.toggle("current", box === hits[hit]);
    });
  }
  search.addEventListener("input", () => {
    const words = search.value.trim().toLowerCase();
    hits = words ? boxes.filter((box) => box.parent && box.known.toLowerCase().includes(words)) : [];
    hit = -1;
    mark();
    found.textContent = words ? `${hits.length} found` : "";
  });
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !hits.length) return;
    hit = (hit + (event.shiftKey ? hits.length - 1 : 1) + (hit < 0 && event.shiftKey)) % hits.length;
    const box = hits[hit];
    for (let above = box.parent; above; above = above.parent) set(above, true);
    refresh();
    mark();
    const handle = shown(box).getBoundingClientRect();
    const view = canvas.getBoundingClientRect();
    canvas.scrollBy(
      handle.left + handle.width / 2 - view.left - view.width / 2,
      handle.top + handle.height / 2 - view.top - view.height / 2,
    );
    show(box);
    found.textContent = `${hit + 1} of ${hits.length}`;
  });

  // Zoom and pan

  function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const before = scale;
    scale = Math.min(4, Math.max(0.02, scale * factor));
    const grown = scale / before;
    const [left, top] = [(canvas.scrollLeft + x) * grown - x, (canvas.scrollTop + y) * grown - y];
    resize();
    canvas.scrollTo(left, top);
  }
  document.getElementById("in").addEventListener("click", () => zoom(1.25));
  document.getElementById("out").addEventListener("click", () => zoom(0.8));
  document.getElementById("scale").addEventListener("click", () => zoom(1 / scale));
  document.getElementById("fit").addEventListener("click", () => {
    const [width, height] = [root.width + 2 * sizes.pad, root.height + 2 * sizes.pad];
    zoom(Math.min(canvas.clientWidth / width, canvas.clientHeight / height) / scale);
  });
  canvas.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      const view = canvas.getBoundingClientRect();
      zoom(Math.exp(-event.deltaY / 400), event.clientX - view.left, event.clientY - view.top);
    },
    { passive: false },
  );
  let grip = null;
  canvas.addEventListener("pointerdown", (event) => {
    dragged = false;
    if (event.pointerType === "mouse" && event.button === 0) grip = [event.clientX, event.clientY];
  });
  window.addEventListener("pointermove", (event) => {
    if (!grip) return;
    const [dx, dy] = [event.clientX - grip[0], event.clientY - grip[1]];
    if (!dragged && Math.hypot(dx, dy) < 4) return;
    dragged = true;
    canvas.scrollBy(-dx, -dy);
    grip = [event.clientX, event.clientY];
  });
  window.addEventListener("pointerup", () => (grip = null));

  root.width = figure.viewBox.baseVal.width - 2 * sizes.pad;
  root.height = figure.viewBox.baseVal.height - 2 * sizes.pad;
  canvas.scrollTo(Math.max(0, (canvas.scrollWidth - canvas.clientWidth) / 2), 0);
})();
