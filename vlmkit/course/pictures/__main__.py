"""Draw the pictures again and print their questions: `python -m vlmkit.course.pictures`."""

from vlmkit.course.pictures import SAMPLES

for sample in SAMPLES:
    row = sample.draw()
    row["images"][0].save(sample.path, optimize=True)
    print(f"{sample.path.name}: {row['question']!r}, {row['answer']!r}")
