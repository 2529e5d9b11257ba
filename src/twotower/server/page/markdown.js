// Markdown to elements. Text only ever becomes text nodes, links lead to http, https and mailto alone, and pictures are
// links, so that what a model writes can neither run nor load anything.

const SAFE = /^(https?:\/\/|mailto:)/i;
// In this order: code, link or picture, bold, italic, struck, bare address
const INLINE =
  /(`+)([^`](?:.*?[^`])?)\1(?!`)|!?\[([^\]\n]*)\]\(\s*<?([^\s)>]+)>?(?:\s+"[^"]*")?\s*\)|(\*\*|__)(?=\S)([\s\S]*?\S)\5|(?<![\w*_])([*_])(?=\S)([\s\S]*?\S)\7(?!\w)|~~(?=\S)([\s\S]*?\S)~~|(https?:\/\/[^\s<>()]*[^\s<>().,;:!?'"])/;
const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const TABLE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 8;

// A fragment with the elements of a text. `copyButton(text)` makes the button of a code block.
export function rendered(text, copyButton) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(text.replace(/\r\n?/g, "\n").split("\n"), copyButton, 0));
  return fragment;
}

function blocks(lines, copyButton, depth) {
  const out = [];
  let i = 0;
  const takeWhile = (test) => {
    const from = i;
    while (i < lines.length && test(lines[i], i > from)) i += 1;
    return lines.slice(from, i);
  };
  while (i < lines.length) {
    const line = lines[i];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (!line.trim()) {
      i += 1;
    } else if (fence) {
      i += 1;
      const code = takeWhile((one) => !(one.trim().startsWith(fence[1]) && one.trim().replaceAll(fence[1][0], "") === ""));
      i += 1;
      out.push(codeBlock(code.join("\n"), fence[2], copyButton));
    } else if (heading) {
      i += 1;
      // the page itself has h1 and h2
      out.push(element(`h${Math.min(heading[1].length + 2, 6)}`, ...inline(heading[2])));
    } else if (RULE.test(line)) {
      i += 1;
      out.push(element("hr"));
    } else if (/^ {0,3}>/.test(line) && depth < DEEPEST) {
      const quoted = takeWhile((one) => /^ {0,3}>/.test(one)).map((one) => one.replace(/^ {0,3}> ?/, ""));
      out.push(element("blockquote", ...blocks(quoted, copyButton, depth + 1)));
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const indent = ITEM.exec(line)[1].length;
      const belongs = (one, later) => ITEM.test(one) || (later && (!one.trim() || /^\s/.test(one)));
      const sameKind = isOrdered(line);
      const taken = takeWhile((one, later) => belongs(one, later) && !(ITEM.test(one) && ITEM.exec(one)[1].length <= indent && isOrdered(one) !== sameKind));
      out.push(list(taken, copyButton, depth + 1));
    } else if (line.includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && TABLE.test(lines[i + 1])) {
      out.push(table(takeWhile((one) => one.includes("|"))));
    } else {
      const begins = (one) => FENCE.test(one) || HEADING.test(one) || RULE.test(one) || ITEM.test(one) || /^ {0,3}>/.test(one);
      const taken = takeWhile((one, later) => one.trim() && !(later && begins(one)));
      out.push(element("p", ...inline(taken.join("\n").trim())));
    }
  }
  return out;
}

function isOrdered(line) {
  return /^\s*\d/.test(line);
}

function list(lines, copyButton, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= indent.length + 1) items.push([found[3]]);
    else items[items.length - 1].push(line.replace(/^(\t| {1,4})/, ""));
  }
  const made = element(isOrdered(lines[0]) ? "ol" : "ul");
  if (isOrdered(lines[0])) made.start = parseInt(mark, 10);
  for (const item of items) {
    const inside = blocks(item, copyButton, depth);
    // an item of one paragraph needs no space around it
    if (inside[0]?.tagName === "P") inside.splice(0, 1, ...inside[0].childNodes);
    made.append(element("li", ...inside));
  }
  return made;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));
  const row = (line, kind) => element("tr", ...cells(line).map((cell) => element(kind, ...cell)));
  const body = lines.slice(2).map((line) => row(line, "td"));
  const made = element("table", element("thead", row(lines[0], "th")), element("tbody", ...body));
  const wrapped = element("div", made);
  wrapped.className = "wide";
  return wrapped;
}

function codeBlock(code, language, copyButton) {
  const head = element("div", element("span", language), copyButton(code));
  head.className = "code-head";
  const pre = element("pre", element("code", code));
  pre.tabIndex = 0;
  const made = element("div", head, pre);
  made.className = "code";
  return made;
}

// The nodes of a line of text.
function inline(text, depth = 0) {
  const out = [];
  let rest = text;
  while (rest) {
    const found = depth < DEEPEST ? INLINE.exec(rest) : null;
    if (!found) {
      out.push(rest);
      break;
    }
    if (found.index > 0) out.push(rest.slice(0, found.index));
    const [whole, , code, label, address, , bold, , italic, struck, bare] = found;
    if (code !== undefined) out.push(element("code", code.trim()));
    else if (address !== undefined) out.push(link(address, label || address, whole, depth));
    else if (bold !== undefined) out.push(element("strong", ...inline(bold, depth + 1)));
    else if (italic !== undefined) out.push(element("em", ...inline(italic, depth + 1)));
    else if (struck !== undefined) out.push(element("del", ...inline(struck, depth + 1)));
    else out.push(link(bare, bare, bare, DEEPEST));
    rest = rest.slice(found.index + whole.length);
  }
  return out;
}

function link(address, label, whole, depth) {
  if (!SAFE.test(address)) return whole; // javascript:, data: and the like stay text
  const made = element("a", ...(depth < DEEPEST ? inline(label, DEEPEST) : [label]));
  made.href = address;
  made.target = "_blank";
  made.rel = "noopener noreferrer";
  return made;
}

function element(name, ...inside) {
  const made = document.createElement(name);
  made.append(...inside);
  return made;
}
