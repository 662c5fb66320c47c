"""Pictures and the page of a run.

Takes plain results (numbers, dicts of JSON), gives PNG and HTML files. It may import `search` (for
fronts) and `system`.
"""
