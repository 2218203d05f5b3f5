"""The look of the status page: dark and light, wide and narrow, no file of its own and nothing from outside."""

from __future__ import annotations

import base64
import hashlib

STYLE = """
:root{color-scheme:light dark;--bg:#f5f6f8;--card:#fff;--ink:#14181f;--dim:#5b6574;--line:#dfe3e9;--good:#12784a;
--warn:#9a5b00;--bad:#b3261e;--accent:#1f5fbf;--goodbg:#e4f4ec;--badbg:#fdecea;--fill:#1f5fbf22}
@media(prefers-color-scheme:dark){:root{--bg:#0e1116;--card:#171b22;--ink:#e8ecf2;--dim:#98a3b3;--line:#2a313c;
--good:#4fd08b;--warn:#f0b429;--bad:#ff7b72;--accent:#6cb0ff;--goodbg:#12291e;--badbg:#32171a;--fill:#6cb0ff22}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:20px;background:var(--bg);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
h1{font-size:26px;line-height:1.2;margin:0}h1 small{display:block;font-size:14px;font-weight:400;color:var(--dim);margin-bottom:2px}
h2{font-size:13px;letter-spacing:.06em;text-transform:uppercase;color:var(--dim);margin:26px 0 8px}
code,.n{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.93em;font-variant-numeric:tabular-nums}
header p{margin:6px 0 0;color:var(--dim)}
.good{color:var(--good)}.warn{color:var(--warn)}.bad{color:var(--bad)}.dim{color:var(--dim)}
.panel{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;overflow-wrap:anywhere}
.risk{margin-top:16px;border-left:6px solid var(--bad);background:var(--badbg)}
.risk.none{border-left-color:var(--good);background:var(--goodbg)}
.risk b{font-size:16px}.risk ul{margin:6px 0 0;padding-left:20px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,270px),1fr));gap:12px;position:relative}
.card{border-top:4px solid var(--line)}.card.primary{border-top-color:var(--good)}.card.off{border-top-color:var(--bad)}
.card.standby{border-top-color:var(--accent)}
.card h3{margin:0;font-size:18px;display:flex;justify-content:space-between;gap:8px;align-items:baseline}
.role{font-size:12px;font-weight:600;border:1px solid currentColor;border-radius:20px;padding:1px 9px;white-space:nowrap}
.from{margin:2px 0 8px;color:var(--dim)}
dl{display:grid;grid-template-columns:auto 1fr;gap:2px 14px;margin:0}dt{color:var(--dim)}dd{margin:0;text-align:right}
.facts{margin-top:8px}.facts dd{text-align:left}
.note{margin:8px 0 0;color:var(--warn)}
figure{margin:10px 0 0}svg{display:block;width:100%;height:46px;background:var(--bg);border-radius:6px}
polyline{fill:none;stroke:var(--accent);stroke-width:1.6;vector-effect:non-scaling-stroke}
polygon{fill:var(--fill)}.gap{fill:var(--bad);opacity:.35}
figcaption{display:flex;justify-content:space-between;font-size:12px;color:var(--dim);margin-top:3px}
table{width:100%;border-collapse:collapse}th{text-align:left;font-weight:500;color:var(--dim);font-size:13px}
td,th{padding:5px 12px 5px 0;vertical-align:top;border-bottom:1px solid var(--line)}tr:last-child td{border-bottom:0}
td:first-child{white-space:nowrap}
footer{margin:26px 0 8px;color:var(--dim);font-size:13px}a{color:var(--accent)}
@media(max-width:560px){body{padding:12px;font-size:14px}h1{font-size:21px}
.log td{display:block;border:0;padding:0}.log tr{display:block;padding:7px 0;border-bottom:1px solid var(--line)}.log tr.head{display:none}}
""".strip()

_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()

CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""Not even a script of our own: what a peer or a user named cannot become one."""
