"""Many different requests at once get the answers that each of them gets alone."""

import random
from concurrent.futures import ThreadPoolExecutor

from dllm.serving.engine import Engine
from tests.serving.servers import ask, running, served
from tests.serving.soak import cases, said


def test_32_mixed_requests_at_once_are_answered_as_the_model_answers_each_alone(taught):
    good = cases(taught)
    random.Random(0).shuffle(good)
    chosen = good[:32]
    engine = Engine(taught, name="toy", batch_size=16, batch_tokens=1024)
    with running([served(taught, engine=engine)]) as server, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda case: ask(server.url, case[0], case[1]), chosen))
    for (path, body, alone), answer in zip(chosen, answers, strict=True):
        assert answer.status == 200, answer
        assert said(body, answer) == alone, (path, body)
