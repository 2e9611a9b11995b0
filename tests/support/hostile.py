"""Words that try to leave the string, comment or docstring that they are put into."""

from __future__ import annotations

HOSTILE = [
    "plain",
    "it's",
    'a "quoted" word',
    "both ' and \"",
    '"""',
    "'''",
    '""""',
    'ends with a quote"',
    "ends with a backslash\\",
    "\\",
    "\\\\'\"",
    "two\nlines",
    "carriage\rreturn",
    "tab\tnul\x00bell\x07",
    "\u2028\u2029\u0085\x0b\x0c line ends of all kinds",
    "größer ≥ 二 \N{PILE OF POO}",
    "\udc80 lone surrogate",
    "{{ 7 * 7 }} {% raw %} {# #} {x}",
    "'); import os; os.abort(); ('",
    "# noqa\n__import__('os').abort()",
    "-->" * 60,
    "long " * 60,
    "x" * 300,
]
