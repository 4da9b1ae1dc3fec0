"""The marks that models write around their reasoning."""

_NAMES = "(?:seed:)?think|thinking|thoughts?|reasoning|analysis"
OPENING = rf"<(?:{_NAMES})>|◁think▷|\[THINK\]|<\|begin_of_thought\|>"
CLOSING = rf"</(?:{_NAMES})>|◁/think▷|\[/THINK\]|<\|end_of_thought\|>"
