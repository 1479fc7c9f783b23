"""Strings that mean to be more than text, and what a browser makes of the HTML that they are put into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import html5lib

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

HACK: Final = "window.hacked=1"
HARMLESS: Final = "harmless"

STRINGS: Final = (
    # elements that run or load something
    f"<script>{HACK}</script>",
    f"<img src=x onerror={HACK}>",
    f"<svg onload={HACK}>",
    f"<svg><script>{HACK}</script></svg>",
    f"<svg><animate onbegin={HACK} attributeName=x dur=1s></svg>",
    f"<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=x onerror={HACK}&gt;'>",
    f"<details open ontoggle={HACK}><summary>x</summary></details>",
    f"<body onload={HACK}>",
    f"<input autofocus onfocus={HACK}>",
    f"<video><source onerror={HACK}></video>",
    f"<iframe srcdoc='<script>parent.{HACK}</script>'></iframe>",
    f"<iframe src=javascript:parent.{HACK}></iframe>",
    f"<object data=\"data:text/html,<script>{HACK}</script>\"></object>",
    f"<a href=\"javascript:{HACK}\">click</a>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:1/'>",
    "<base href=http://127.0.0.1:1/>",
    "<link rel=stylesheet href=http://127.0.0.1:1/x.css>",
    "<style>*{display:none}</style>",
    "<form action=http://127.0.0.1:1/><button>Save</button></form>",
    "<marquee>x</marquee><blink>x</blink>",
    # out of an attribute, an element, a comment, a script
    f"\" onmouseover=\"{HACK}\" x=\"",
    f"' onmouseover='{HACK}' x='",
    f"` onmouseover=`{HACK}",
    f"\"><script>{HACK}</script>",
    f"'><img src=x onerror={HACK}>",
    "\" style=\"position:fixed;inset:0;background:red",
    "</div></div></section></ul></li></body></html>",
    "</li><li>one more",
    "</title><title>other",
    f"</textarea><script>{HACK}</script>",
    f"</script><script>{HACK}</script>",
    f"</style><img src=x onerror={HACK}>",
    "--><!-- <b>x",
    "<!--", "]]>", "<![CDATA[<b>x</b>]]>",
    "<", "<b", "<b x=", "&", "&lt;b&gt;", "&#60;b&#62;", "&#x3c;script&#x3e;", "&lt", "&amp;lt;b&amp;gt;",
    # what templates, Markdown, JSON and shells would make more of
    "${" + HACK + "}", "{{constructor.constructor('" + HACK + "')()}}", "{" + HACK + "}", "{@html '<b>x</b>'}",
    "<%= 7*7 %>", "#{7*7}", "%s%n%(x)s{0}{x!r}",
    f"[x](javascript:{HACK}) ![x](http://127.0.0.1:1/x.png) **b** `c` <b>d</b>",
    "$$\\href{javascript:" + HACK + "}{x}$$",
    "\"},\"__type__\":\"update\",\"visible\":false,{\"x\":\"",
    # characters that turn, hide, cut or break
    "\N{RIGHT-TO-LEFT OVERRIDE}<gnp.b>\N{LEFT-TO-RIGHT ISOLATE}",
    "nul\0<b\0>x</b>",
    "line\r\n<b>x</b>\u2028\u2029\x0b\x0c\x1b[31m\x7f\x85",
    "half \ud83d of <b> \udc00",
    "\ufeff<\u0300b\u200d>\ufffe\uffff" + 10 * "\N{COMBINING GRAVE ACCENT}",
    "\N{FULLWIDTH LESS-THAN SIGN}b\N{FULLWIDTH GREATER-THAN SIGN}<İmg src=x>",
    "<b>" * 400 + "x" * 5000,
)  # fmt: skip

READ_OUT: Final = ("aria-label", "aria-valuetext", "alt", "title")  # attributes that are text

Shape: TypeAlias = list[tuple[int, str, dict[str, str]]]


def _parsed(text: str) -> Element:
    """`text` as it becomes elements below a <div>, by the rules of browsers."""
    fragment: Element = html5lib.parseFragment(text, container="div", treebuilder="etree", namespaceHTMLElements=False)
    return fragment


def shape(text: str) -> Shape:
    """Elements and comments in their order, each with its depth and its attributes; of what is text only that it is."""
    found: Shape = []
    waiting = [(0, _parsed(text))]
    while waiting:
        depth, element = waiting.pop()
        values = {name: "" if name in READ_OUT else value for name, value in element.attrib.items()}
        found.append((depth, str(element.tag), values))
        waiting += [(depth + 1, child) for child in reversed(element)]
    return found


def read(text: str) -> str:
    """All that can be read of it, attributes that are read out too."""
    parts = []
    for element in _parsed(text).iter():
        parts += [value for name, value in element.attrib.items() if name in READ_OUT]
        parts += [part for part in (element.text, element.tail) if part]
    return "".join(parts)
