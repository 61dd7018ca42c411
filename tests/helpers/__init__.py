"""What the tests share beside the fixtures of `conftest.py`.

Models and data: `tiny`, `damaged`, `reference`. Servers: `serving`, `endpoint`. Processes: `forked`, `several`,
`interrupted`, `killed`, `command`.
"""
