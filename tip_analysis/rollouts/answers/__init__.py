"""Whether two written answers are the same: what the grader `math` does around math-verify.

`reading` finds the answer in a response, `notation` gives every spelling of a number or formula one
form, `choices`, `quantities` and `numerals` compare what math-verify would get wrong, and
`equality` asks them in turn; read it first. Runs in the process of `math_worker`, which imports
nothing heavy until it is needed.
"""
