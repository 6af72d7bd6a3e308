"""Open questions about facts that conversations state: the part of the MMLU miniature that `facts_mini.yaml` uses."""


def once(documents):
    """Each question once: the files ask some several times, with other choices."""
    seen, numbers = set(), []
    for number, question in enumerate(documents["question"]):
        if question not in seen:
            seen.add(question)
            numbers.append(number)
    return documents.select(numbers)
