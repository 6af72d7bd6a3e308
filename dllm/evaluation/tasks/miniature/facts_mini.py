"""Questions about facts that conversations tell, asked openly: what `facts_mini.yaml` takes of the MMLU miniature."""


def once(documents):
    """Each question once: the files ask some several times, with other choices."""
    seen, numbers = set(), []
    for number, question in enumerate(documents["question"]):
        if question not in seen:
            seen.add(question)
            numbers.append(number)
    return documents.select(numbers)
