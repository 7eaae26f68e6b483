//! Self-contained HTML pages: one file that opens anywhere, with nothing beside it and no script.

pub mod chart;
pub mod heatmap;

use std::fmt::Write;

/// A page under construction.
#[derive(Debug, Clone)]
pub struct Page {
    title: String,
    body: String,
}

impl Page {
    /// A page with its title as the first heading.
    pub fn new(title: &str) -> Self {
        Self { title: title.to_string(), body: format!("<h1>{}</h1>\n", escape(title)) }
    }

    /// Begins a section.
    pub fn heading(&mut self, text: &str) {
        self.html(&format!("<h2>{}</h2>", escape(text)));
    }

    /// A paragraph.
    pub fn paragraph(&mut self, text: &str) {
        self.html(&format!("<p>{}</p>", escape(text)));
    }

    /// A table; cells that begin like numbers are set to the right.
    pub fn table<R: AsRef<[String]>>(&mut self, head: &[&str], rows: impl IntoIterator<Item = R>) {
        let cells = head.iter().map(|cell| format!("<th>{}</th>", escape(cell)));
        let mut table = format!("<table>\n<tr>{}</tr>\n", cells.collect::<String>());
        for row in rows {
            let cells = row.as_ref().iter().map(|cell| {
                let number = cell.starts_with(|first: char| first.is_ascii_digit() || first == '-');
                format!("<td{}>{}</td>", if number { " class=\"n\"" } else { "" }, escape(cell))
            });
            let _ = writeln!(table, "<tr>{}</tr>", cells.collect::<String>());
        }
        self.html(&(table + "</table>"));
    }

    /// A plot with what it shows below it.
    pub fn figure(&mut self, svg: &str, caption: &str) {
        self.html(&format!("<figure>{svg}<figcaption>{}</figcaption></figure>", escape(caption)));
    }

    /// Markup as it stands.
    pub fn html(&mut self, markup: &str) {
        self.body.push_str(markup);
        self.body.push('\n');
    }

    /// The whole file.
    pub fn finish(self) -> String {
        let Self { title, body } = self;
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width\">\n<title>{}</title>\n\
             <style>\n{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n",
            escape(&title)
        )
    }
}

const STYLE: &str = "\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9em; }
th, td { padding: .2em .6em; border-bottom: 1px solid #ddd; text-align: left; } td.n { text-align: right; white-space: nowrap; }
figure { margin: 1em 0; } figcaption { color: #666; font-size: .9em; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #222; }
";

/// Text as markup.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            _ => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        let mut page = Page::new("a <b>");
        page.heading("1 & 2");
        page.table(&["<i>"], [["\"3\"".to_string()]]);
        let page = page.finish();
        for text in ["<title>a &lt;b&gt;</title>", "<h2>1 &amp; 2</h2>", "<th>&lt;i&gt;</th>"] {
            assert!(page.contains(text), "{text}");
        }
        assert!(page.contains("<td>&quot;3&quot;</td>"));
    }

    #[test]
    fn numbers_are_set_to_the_right() {
        let mut page = Page::new("numbers");
        page.table(&["what", "ms"], [["dense".to_string(), "1.5".to_string()]]);
        assert!(page.finish().contains("<td>dense</td><td class=\"n\">1.5</td>"));
    }
}
