"""Talking to a model: sessions, their rendering, sample conversations, steps against time.

settings    the configs of `dllm sample` and `dllm speed`; which checkpoint a name means   (no torch)
session     a conversation, its settings, its commands                                    (no torch, no terminal)
local       a model of this process that answers
remote      a model behind a server that answers                                          (no torch)
render      a canvas as coloured text
samples     conversations and the filmstrip of the report
speed       steps against time and quality
"""
