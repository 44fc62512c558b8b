"""Draw the pictures anew and say what each is asked: `python -m vlmkit.course.pictures`."""

from vlmkit.course.pictures import SAMPLES

for sample in SAMPLES:
    row = sample.draw()
    row["images"][0].save(sample.path, optimize=True)
    print(f"{sample.path.name}: {row['question']!r}, {row['answer']!r}")
