"""Tables: how vlmkit's results show themselves in a terminal and in a notebook."""

import html


class Table:
    """A result that shows itself as text and as HTML.

    A subclass has `table()`. It can also define how the numbers are written (`_text_table`), a line
    above the table (`_headline`) and sentences below it (`_remarks`).
    """

    def table(self):
        """A pandas DataFrame of plain numbers."""
        raise NotImplementedError

    def _text_table(self):
        """The table as it is printed: sizes in MB, shares in percent."""
        return self.table()

    def _headline(self):
        return ""

    def _remarks(self):
        return ()

    def __str__(self):
        head = self._headline()
        return "\n".join(
            [*([head] if head else []), self._text_table().to_string(), *self._remarks()]
        )

    def _repr_html_(self):
        head = self._headline()
        remarks = "<br>".join(html.escape(remark) for remark in self._remarks())
        return (
            (f"<p><b>{html.escape(head)}</b></p>" if head else "")
            + self._text_table().to_html()
            + (f"<p>{remarks}</p>" if remarks else "")
        )
