"""Extraction and equality of answers: the formats that models write, and wrong answers that look alike."""

import json
from pathlib import Path

import pytest

from megatron_egrsd.rewards.answers import final_answer, gold_answer, states_answer
from megatron_egrsd.rewards.normal_form import normalize, number
from megatron_egrsd.rewards.reward import math_reward

DATA = Path(__file__).parents[1] / "data"

# (response, answer)
RIGHT = [
    ("42", "42"),
    ("The answer is 18.", "#### 18"),
    ("A: 18", "so\n#### 18"),
    (r"\boxed{1,234}", "1234"),
    (r"\boxed{10 m/s}", "10"),
    (r"\boxed{9.8\text{ m/s}^2}", "9.8"),
    ("The answer is not 4 but 5.", "5"),
    ("$1,234.00", "#### 1,234"),
    ("It is 07", "7"),
    ("7", "07"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\dfrac12}", r"\frac{1}{2}"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{90}", r"90^{\circ}"),
    (r"\boxed{5\text{ cm}^2}", "5"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{50.0\%}", r"50\%"),
    (r"\boxed{0.5}", r"50\%"),
    (r"\boxed{\text{June 20}}", r"\text{June 20}"),
    (r"\boxed{(B)}", "B"),
    (r"\boxed{\text{(B)}}", r"\text{B}"),
    (r"\boxed{1} and \boxed{2}", "1,2"),
    (r"$\boxed{3}$, $\boxed{5}$ and $\boxed{7}$", "3,5,7"),
    (r"\boxed{2,1}", "1,2"),
    (r"\boxed{(1,2]}", "(1, 2]"),
    (r"\boxed{\{1,2\}}", r"\{2,1\}"),
    (r"\boxed{[0,\infty)}", r"x \in [0, \infty)"),
    (r"\boxed{x=5}", "5"),
    (r"\boxed{5}", "x=5"),
    ("<think>so 3? \\boxed{3}</think>\n\nThe answer is 4", "4"),
    (r"The final answer is $\frac{3}{4}$. I hope it is correct.", r"\frac{3}{4}"),
    ("**Answer:** 18 dollars", "18"),
    ("# Answer\n\n18", "18"),
    ("She makes 9*2 = 18 dollars a day.", "18"),
    ("The area is 12.5 cm$^2$.", "12.5"),
    (r"The area is $12.5$ m\(^2\), if it is flat.", "12.5"),
    ("The tiles cost 12 dollars a m$^2$, so she pays 40.", "40"),
    (r"So it opens by 30$^{\circ}$ in the end.", "30"),
    ("There are 10$^5$ of them.", "100000"),
    ("It follows that x$_1$ comes to 5 here.", "5"),
    ("The final answer is: the whole area covers 12.5 cm$^2$", "12.5"),
    ("So, in total, that gives 1,200 apples in the whole of this very long sentence.", "1200"),
    (r"\boxed{3\frac{1}{2}}", r"\frac{7}{2}"),
    (r"\boxed{4.5\times 10^{33}}", "4.5e33"),
    (r"\boxed{2\pi}", r"2 \pi"),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
    (r"\boxed{-\frac{1}{3}}", r"\frac{-1}{3}"),
    (r"\boxed{0.333333}", "1/3"),
    (r"\boxed{\$18}", "18"),
    (r"the answer is: $$\boxed{10\,000}$$", "10000"),
    (r"\boxed{18 \text{ dollars per day}}", "18"),
    (r"\boxed{\left(3, \frac{\pi}{2} \right)}", r"(3,\pi/2)"),
    (r"\boxed{y = 2x + 1}", "y=2x+1"),
    (r"\boxed{2x+1}", "y=2x+1"),
    (r"\boxed{x \ge 3}", r"x\geq 3"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"The answer is \(\frac{5}{6}\).", r"\frac56"),
    ("answer: -5", "-5"),
    ("The total cost is $25.50", "25.5"),
    (r"The value is $\frac{1}{2}$.", r"\frac{1}{2}"),
    (r"\boxed{1/2}", r"\frac12"),
    (r"\boxed{\text{even}}", "even"),
    ("The answer is (C).", "C"),
    (r"\boxed{3 + 4i}", "4i+3"),
    (r"\boxed{11}_{2}", "11"),
    (r"\boxed{5 \text{ or } 7}", "5,7"),
    (r"\boxed{5 and 7}", "7,5"),
    (r"\boxed{1\pm\sqrt{2}}", r"1+\sqrt2,1-\sqrt2"),
    (r"\boxed{10^{-3}}", "0.001"),
    ("18", "18."),
    ("So he has 3 hours.\nThe answer is 3 hours", "3"),
    (r"\boxed{12.0}", "12"),
    (r"\fbox{9}", "9"),
    (r"\boxed 5", "5"),
    (r"\boxed{45 minutes}", "45"),
    (r"\boxed{6:00 PM}", r"6:00 \text{ p.m.}"),
    (r"The final answer is \$18", "18"),
    ("Janet makes **$18** every day at the market, as computed above.", "18"),
    (r"$\boxed{\text{Evelyn}}$", r"\text{Evelyn}"),
    (r"\boxed{2516_8}", "2516_8"),
    (r"\boxed{2516}", "2516_8"),
    (r"\boxed{.5}", "0.5"),
    ("The answer is 5/8 of the cake.", "5/8"),
    (r"\boxed{3:2}", "3:2"),
    (r"\boxed{x^2 + 3x}", "3x+x^2"),
    (r"\boxed{\frac{\sqrt{3}}{3}}", r"\frac{1}{\sqrt{3}}"),
    (r"\boxed{\log_2 8}", "3"),
    (r"\boxed{5!}", "120"),
    (r"\boxed{-4,-1}", "-1,-4"),
    (r"\boxed{(-\infty, 2) \cup (3, \infty)}", r"(3,\infty)\cup(-\infty,2)"),
    # The place of the answer.
    ("She makes 9 * 2 = 18 dollars.\nA: 18", "18 = <<9*2=18>>18 every day.\nA: 18"),
    ("It follows.\n\n# Answer\n\n3,456", "3456"),
    ("It follows.\n\n# Answer\n\nJune 20", r"\text{June 20}"),
    ("**Final Answer**\n\n$x = 7$", "7"),
    ("### Final answer\n\n\\[ \\boxed{7} \\]\n\nI checked it.", "7"),
    ("Final Answer: The largest $n$ is 34.", "34"),
    ("Final Answer: The volume of $ABCD$ is 120. I hope it is correct.", "120"),
    ("The answer is $5$ because $2+3=5$.", "5"),
    ("The answer is $-1$ and $4$.", "4, -1"),
    ("The answer is $1{,}000$ metres.", "1000"),
    ("First \\boxed{200}, then \\boxed{255} more. Final Answer: The final answer is $10,455$.", "10455"),
    (r"It is \boxed{7}. The answer is consistent with the bound $n<9$.", "7"),
    (r"\boxed{\frac{1}{2}} is the probability of heads; \boxed{\frac{1}{4}} of two.", r"\frac14"),
    (r"$$\boxed{(2, 2)} \quad \text{and} \quad \boxed{(6, 2)}$$", "(2, 2), (6, 2)"),
    (r"$y_1 = \boxed{3}$ and $y_2 = \boxed{5}$", "3, 5"),
    ("#### 18 dollars", "18"),
    ("#### $18.00", "18"),
    ("#### Step 3: add\n9 + 9 = 18\n\nThe answer is 18", "18"),
    ("#### 3. Conclusion\nSo there are 18.", "18"),
    ("#### Evelyn", r"\text{Evelyn}"),
    ("To answer this we need 3 things: 4 and 5. In the end 12 remain.", "12"),
    ("Options: A. 12 B. 15. Hence 15 is right, so **B**.\n\nThe answer is B.", r"\text{(B)}"),
    ("Thus they need 18.", "18"),
    ("Thus, $x=\\frac{3}{4}$.", r"\frac{3}{4}"),
    ("所以答案是 18。", "18"),
    # Numbers.
    (r"\boxed{1{,}000}", "1000"),
    (r"\boxed{1\,000}", "1,000"),
    (r"\boxed{11,\! 111,\! 111,\! 100}", "11111111100"),
    (r"\boxed{1 000 000}", "1000000"),
    (r"\boxed{10, 000}", "10000"),
    (r"\boxed{10,\ 000 \text{ dollars}}", "10,000"),
    (r"\boxed{120, 60}", "60, 120"),
    (r"\boxed{60,120}", "60, 120"),
    (r"\boxed{120^\circ, 60^\circ}", r"60^\circ, 120^\circ"),
    (r"\boxed{300, 100, 200}", "100, 200, 300"),
    (r"\boxed{30 and 150}", "30, 150"),
    (r"\boxed{\frac{20,000}{\pi}}", r"\frac{20000}{\pi}"),
    (r"\boxed{-\frac{3}{4}}", "-0.75"),
    (r"\boxed{\tfrac{3}{4}}", "3/4"),
    (r"\boxed{\frac 34}", r"\dfrac{3}{4}"),
    (r"\boxed{1 \frac{4}{5}}", r"1\frac{4}{5}"),
    (r"\boxed{1 4/5}", r"\frac95"),
    (r"\boxed{9/5}", r"1\frac{4}{5}"),
    (r"\boxed{3 \cdot 10^{8}}", r"3\times 10^8"),
    (r"\boxed{3e8}", "300000000"),
    (r"\boxed{6.67 \times 10^{-11} \text{ N m}^2/\text{kg}^2}", "6.67e-11"),
    (r"\boxed{3.00 \times 10^{8} \mathrm{~m} / \mathrm{s}}", "3e8"),
    (r"\boxed{12.5\%}", "12.5"),
    (r"\boxed{2516_{8}}", "2516_8"),
    (r"\boxed{12th}", "12"),
    (r"\boxed{12^{\mathrm{th}} \text{ grade}}", "12"),
    # Units, money, angles, times.
    (r"\boxed{\$18.90}", "18.9"),
    (r"\boxed{18.90}", r"\$18.90"),
    (r"\boxed{72^{\circ}}", "72"),
    (r"\boxed{72°}", r"72^\circ"),
    (r"\boxed{72 \text{ degrees}}", r"72^\circ"),
    (r"\boxed{\frac{270}{7} \text{ degrees}}", r"\frac{270}7\text{ degrees}"),
    (r"\boxed{15\text{ cm}^2}", r"15\mbox{ cm}^2"),
    (r"\boxed{8\sqrt{3}}", r"8\sqrt{3} \text { square inches}"),
    (r"The answer is 8\sqrt{3} square inches", r"8\sqrt{3}"),
    (r"\boxed{3/4 \pi \text{ inches}}", r"\frac{3}{4}\pi"),
    (r"\boxed{3:00 \text{ PM}}", r"3\!:\!00 \text{ p.m.}"),
    (r"\boxed{3 PM}", "3:00 p.m."),
    # Expressions and equations.
    (r"\boxed{m + n = 16}", "16"),
    (r"\boxed{\angle ABC = 30^\circ}", "30"),
    (r"\boxed{x = \frac{10}{2} = 5}", "5"),
    (r"\boxed{\frac{22}{7} \approx 3.143}", r"\frac{22}{7}"),
    (r"\boxed{f(x) = x^2}", "x^2"),
    (r"\boxed{2x - y + 1 = 0}", "y = 2x + 1"),
    (r"\boxed{2/3 \pi}", r"\frac{2}{3}\pi"),
    (r"\boxed{1/5 + 3/5i}", r"\frac{1}{5} + \frac{3}{5}i"),
    (r"\boxed{\frac{\pi}{4} + 2 - \sqrt{2}}", r"\frac \pi4 + 2 - \sqrt2"),
    (r"\boxed{√2/2}", r"\frac{\sqrt{2}}{2}"),
    (r"\boxed{2π}", r"2\pi"),
    (r"\boxed{e^{2x}}", "(e^x)^2"),
    (r"\boxed{2 \pi r}", r"2\pi r"),
    (r"\boxed{x >= 3}", r"x \ge 3"),
    # Tuples, intervals, sets, matrices.
    (r"\boxed{3 < \lambda \le 4}", "(3,4]"),
    (r"\boxed{(x, y) = (3, 4)}", "(3,4)"),
    (r"\boxed{x = 3, y = 4}", "(3,4)"),
    (r"\boxed{n = 2, k = 45}", "k = 45, n = 2"),
    (r"\boxed{-10,-8,4}", r"a = 4,\,-8,\,-10"),
    (r"\boxed{\left(3, \tfrac12\right)}", "(3, 0.5)"),
    (r"\boxed{[-2,7]}", r"x \in [-2,7]"),
    (r"\boxed{\{-2, 1+\sqrt{5}, 1-\sqrt{5}\}}", r"\{1\pm\sqrt{5},-2\}"),
    (r"\boxed{x=1 \text{ or } x=2}", "1, 2"),
    (r"\boxed{(2,1),(1,2)}", "(1,2),(2,1)"),
    (r"\boxed{\pm 3}", "3, -3"),
    (r"\boxed{\text{red and blue}}", "blue and red"),
    (r"\boxed{\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}"),
    (r"\boxed{\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}}", r"\begin{pmatrix} 1&2\\3&4 \end{pmatrix}"),
    # Choices.
    (r"\boxed{\textbf{(C)}}", "C"),
    (r"\boxed{C. 5}", r"\text{(C)}"),
    (r"The correct answer is (C) $5$.", "C"),
]

WRONG = [
    ("The area is 12.5 cm$^2$.", "2"),
    ("There are 10$^5$ of them.", "10"),
    ("The answer is not 4.", "4"),
    ("The answer is not 4 but 5.", "4"),
    (r"\boxed{2 m/n}", "2"),
    ("41", "42"),
    (r"\boxed{2}", r"2\pi"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{3}"),
    (r"<think> \boxed{4}", "4"),
    (r"\boxed{1234}", "1235"),
    ("", "5"),
    (r"\boxed{}", "5"),
    (r"\boxed{(1,2)}", "[1,2]"),
    (r"\boxed{odd}", "even"),
    (r"\boxed{3} or \boxed{4}", "3"),
    (r"\boxed{x=5}", "y=4"),
    (r"\boxed{0.33}", "1/3"),
    (r"\boxed{5\%}", "0.5"),
    (r"\boxed{1\%}", r"100\%"),
    (r"\boxed{0.5\%}", r"50\%"),
    (r"\boxed{-5}", "5"),
    (r"\boxed{1,2}", "1,2,3"),
    (r"\boxed{70}", "7"),
    (r"\boxed{3x}", "3"),
    (r"\boxed{A}", "B"),
    (r"\boxed{12}", "1,2"),
    (r"\boxed{(2,1)}", "(1,2)"),
    ("I do not know", "7"),
    (r"\boxed{1,5}", "15"),
    (r"\boxed{0.5}", "5"),
    (r"\boxed{3}", "-3"),
    (r"\boxed{(1,2)}", r"\{1,2\}"),
    (r"\boxed{\{1,2\}}", "(1,2)"),
    (r"\boxed{x^2+1}", "x^2-1"),
    (r"\boxed{3:2}", "3:1"),
    (r"\boxed{3 PM}", "3:00 AM"),
    (r"\boxed{3:00 PM}", "3:30 PM"),
    (r"\boxed{15:00}", "3:00 AM"),
    (r"\boxed{2516_9}", "2516_8"),
    (r"\boxed{111, 111}", "111,111,111"),
    (r"\boxed{120, 60}", "60, 180"),
    (r"\boxed{120}", "60, 120"),
    (r"\boxed{1,234}", "1,2,3,4"),
    (r"\boxed{100}", "1,00"),
    (r"\boxed{-x = 4}", "4"),
    (r"\boxed{2x = 4}", "4"),
    (r"\boxed{25}", "x^2 + y^2 = 25"),
    (r"\boxed{x = 2, y = 1}", "x = 1, y = 2"),
    (r"\boxed{y = 1, x = 2}", "(1, 2)"),
    (r"\boxed{[1,2)}", "(1,2]"),
    (r"\boxed{\pm 3}", "3"),
    (r"\boxed{3}", r"\pm 3"),
    (r"\boxed{3 \text{ or } 4}", "4"),
    (r"\boxed{\frac{1}{10^9}}", r"\frac{1}{10^8}"),
    (r"\boxed{\sqrt{2} \times 10^{-9}}", r"\sqrt{3} \times 10^{-9}"),
    (r"\boxed{\frac{1}{200!}}", r"\frac{1}{2004!}"),
    (r"\boxed{3 \times 10^8}", r"3 \times 10^9"),
    (r"\boxed{-\frac{\pi}{4} + 2}", r"\frac \pi4 + 2"),
    (r"\boxed{\frac{2}{1}}", r"\frac{1}{2}"),
    (r"\boxed{3.14}", r"\pi"),
    (r"\boxed{1.41}", r"\sqrt{2}"),
    (r"\boxed{\begin{pmatrix} 2 \\ 1 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\boxed{(-\infty, 2)}", "(-\\infty, 2]"),
    (r"\boxed{x > 3}", r"x \geq 3"),
    (r"\boxed{west}", r"\text{east}"),
    (r"\boxed{B. 5}", "C"),
    (r"\boxed{June 21}", "June 20"),
    ("The answer is 12. No wait", "13"),
    (r"\boxed{4} \boxed{5}", "4"),
    ("It could be 4 or 5, or 6", "4"),
    (r"We want \boxed{", "5"),
    (r"So the sum is 3 + 4 =", "7"),
    ("The answer is", "5"),
    (r"\boxed{1234}", "123"),
    (r"\boxed{x}", "5"),
    (r"\boxed{5x}", "5"),
    (r"\boxed{\text{all of } 1, 2, 3, 4, 5}", "5"),
    (r"\boxed{0}", "10^{-12}"),
    (r"\boxed{\infty}", r"-\infty"),
]


@pytest.mark.parametrize(("response", "answer"), RIGHT)
def test_right(response, answer):
    assert math_reward(response, answer) == 1.0


@pytest.mark.parametrize(("response", "answer"), WRONG)
def test_wrong(response, answer):
    assert math_reward(response, answer) == 0.0


def test_answers_in_many_languages_and_forms():
    """Each line has a response, the right answer, and the reward of the one for the other."""
    rows = [json.loads(line) for line in (DATA / "answer_forms.jsonl").read_text().splitlines()]
    wrong = [row for row in rows if math_reward(row["response"], row["gold"]) != row["reward"]]
    assert len(rows) > 270 and not wrong


FORMATS = [
    "<think>Is it \\boxed{1}? No.</think>\n\nThe answer is \\boxed{%s}.",
    "The answer is $%s$.",
    "So we are done.\n#### %s",
    "Final Answer: The final answer is $%s$. I hope it is correct.",
    "**Answer:** $%s$",
]


@pytest.mark.parametrize(
    ("name", "key", "formats"),
    [
        ("gsm8k_test", "answer", [*FORMATS, "%s", "A: %s", "The answer is %s.", "That makes %s dollars in all."]),
        ("aime24", "answer", [*FORMATS, "%s", "A: %s", "The answer is %s."]),
        ("amc23", "answer", [*FORMATS, "%s", "A: %s"]),
        ("minerva_math", "solution", [FORMATS[0], FORMATS[2]]),
    ],
)
def test_real_answers_in_every_format(name, key, formats):
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    golds = [str(int(r[key])) if isinstance(r[key], float) else r[key] for r in rows]
    answers = [gold_answer(g) for g in golds]
    others = answers[1:] + answers[:1]
    for template in formats:
        for gold, right, wrong in zip(golds, answers, others, strict=True):
            assert math_reward(template.replace("%s", right), gold) == 1.0, (template, right)
            if None not in (x := number(normalize(right)), y := number(normalize(wrong))) and x != y:
                assert math_reward(template.replace("%s", wrong), gold) == 0.0, (template, wrong, gold)


def test_unfinished_thinking_is_no_answer():
    assert final_answer("<think>The answer is \\boxed{4}") == []
    assert final_answer("It is \\boxed{3}. <think> \\boxed{4} </think> \\boxed{5}") == ["5"]
    assert final_answer("</think>7") == ["7"]  # a template may have opened the thinking in the prompt


def test_what_states_an_answer():
    for text in [r"so \boxed{4}", "#### 4", "The answer is 4.", "A: 4", "4", "<think>so</think>54", "# Answer\n\n4"]:
        assert states_answer(text), text
    for text in ["", "She has 4 of them left.", "<think>\\boxed{4}", "<think>\\boxed{4}</think>", "We find 3, so on"]:
        assert not states_answer(text), text


def test_check_verifier_lists_what_disagrees(tmp_path, capsys):
    from benchmarks import check_verifier

    graded = tmp_path / "graded.jsonl"
    rows = [{"response": "A: 4", "answer": "4", "correct": True}, {"solution": "5", "answer": "4", "is_correct": True}]
    graded.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check_verifier.main([str(graded), "--at-least", "0.6"]) == 1
    out = capsys.readouterr().out
    assert "line 2: label True, verifier False" in out and "1 of 2 agree (50.00%)" in out
    graded.write_text('{"answer": "4"}\n')
    assert check_verifier.main([str(graded)]) == 2
    assert "neither 'response' nor 'solution'" in capsys.readouterr().err
