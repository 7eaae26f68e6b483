//! The familiar grid of lengths and depths, as a page and as a picture.

use long_context_page::Page;
use long_context_page::heatmap::{HeatMap, Scale};

use super::{NeedleReport, Variant};
use crate::Picture;

/// Colours of the picture: paper, ink, grey for what was not run, then red to green.
const PAPER: u8 = 0;
const INK: u8 = 1;
const MISSING: u8 = 2;
const FIRST: u8 = 3;
const STEPS: u8 = 100;

/// Sizes in the picture, in pixels.
const CELL: (usize, usize) = (56, 26);
const LEFT: usize = 64;
const TOP: usize = 60;
const GAP: usize = 28;
const TEXT: usize = 2;
const TITLE: usize = 3;

impl NeedleReport {
    /// A page with the table, a map of each variant and attention, and the answers that missed a key.
    pub fn page(&self, model: &str) -> String {
        let mut page = Page::new("Keys hidden in a text");
        let config = &self.config;
        page.paragraph(&format!(
            "{model}: {} prompts of each variant, length and depth, {} answers in all. Prompts are the same for \
             every attention. single: one key in the text. choice: three keys, one asked for. several: three \
             keys, all asked for; the depth is that of the first.",
            config.prompts,
            self.trials.len()
        ));
        let (head, rows) = self.rows();
        page.table(&head.iter().map(String::as_str).collect::<Vec<_>>(), rows);
        page.paragraph(
            "Density: kept over causal query-key pairs. Recall: kept probability mass of the sampled rows, mean \
             and minimum. Then the keys found, of the keys asked for.",
        );
        for &variant in &config.variants {
            page.heading(&format!("{variant}: keys found, in percent"));
            page.html("<div style=\"display:flex;flex-wrap:wrap;gap:1em\">");
            for attention in &config.attentions {
                let map = self.map(&attention.name, variant);
                page.figure(&map, &attention.name);
            }
            page.html("</div>");
        }
        self.misses(&mut page);
        page.finish()
    }

    fn map(&self, attention: &str, variant: Variant) -> String {
        let config = &self.config;
        let cells: Vec<Vec<Option<f64>>> = config
            .depths
            .iter()
            .map(|&depth| {
                let cell = |&length| self.cell(attention, variant, length, depth).map(|share| 100.0 * share);
                config.lengths.iter().map(cell).collect()
            })
            .collect();
        let rows: Vec<String> = config.depths.iter().map(|depth| format!("{depth}%")).collect();
        let columns: Vec<String> = config.lengths.iter().map(usize::to_string).collect();
        HeatMap {
            rows: &rows,
            columns: &columns,
            row_title: "depth",
            column_title: "tokens",
            cells: &cells,
            range: (0.0, 100.0),
            scale: Scale::Quality,
            decimals: Some(0),
        }
        .svg()
    }

    fn misses(&self, page: &mut Page) {
        let misses: Vec<_> = self.trials.iter().filter(|trial| trial.found < trial.keys.len()).collect();
        page.heading("Answers that miss a key");
        if misses.is_empty() {
            page.paragraph("None.");
            return;
        }
        page.html(&format!("<details><summary>{} answers</summary>", misses.len()));
        let rows = misses.iter().map(|trial| {
            [
                trial.attention.clone(),
                trial.variant.to_string(),
                trial.length.to_string(),
                format!("{}%", trial.depth),
                trial.prompt.to_string(),
                trial.keys.join(" "),
                trial.answer.clone(),
            ]
        });
        page.table(&["attention", "variant", "tokens", "depth", "prompt", "keys", "answer"], rows);
        page.html("</details>");
    }

    /// The maps side by side: one column a variant, one row an attention.
    pub fn picture(&self) -> Picture {
        let config = &self.config;
        let grid = (CELL.0 * config.lengths.len(), CELL.1 * config.depths.len());
        // A title can be wider than a small grid.
        let title = |variant: Variant, name: &str| format!("{variant}: {name}");
        let widest = config.variants.iter().flat_map(|&variant| {
            config.attentions.iter().map(move |attention| title(variant, &attention.name))
        });
        let widest = widest.map(|title| Picture::text_width(TITLE, &title)).max().unwrap_or(0);
        let panel = (LEFT + grid.0.max(widest) + GAP, TOP + grid.1 + GAP);
        let size = (panel.0 * config.variants.len() + GAP, panel.1 * config.attentions.len() + GAP);
        let mut palette = vec![[255; 3], [34; 3], [221; 3]];
        palette.extend((0..=STEPS).map(|step| Scale::Quality.colour(f64::from(step) / f64::from(STEPS))));
        let mut picture = Picture::new(size.0, size.1, palette);
        picture.fill((0, 0), size, PAPER);
        for (row, attention) in config.attentions.iter().enumerate() {
            for (column, &variant) in config.variants.iter().enumerate() {
                let corner = (GAP + panel.0 * column, GAP + panel.1 * row);
                picture.text(corner, TITLE, INK, &title(variant, &attention.name));
                self.panel(&mut picture, corner, &attention.name, variant);
            }
        }
        picture
    }

    fn panel(&self, picture: &mut Picture, (left, top): (usize, usize), attention: &str, variant: Variant) {
        let centred = |x: usize, text: &str| x + CELL.0.saturating_sub(Picture::text_width(TEXT, text)) / 2;
        for (column, &length) in self.config.lengths.iter().enumerate() {
            let (x, label) = (left + LEFT + CELL.0 * column, length.to_string());
            picture.text((centred(x, &label), top + TOP - 20), TEXT, INK, &label);
        }
        for (row, &depth) in self.config.depths.iter().enumerate() {
            let (y, label) = (top + TOP + CELL.1 * row, format!("{depth}%"));
            picture.text((left, y + 8), TEXT, INK, &label);
            for (column, &length) in self.config.lengths.iter().enumerate() {
                let x = left + LEFT + CELL.0 * column;
                let share = self.cell(attention, variant, length, depth);
                let step = |share: f64| FIRST + (share * f64::from(STEPS)).round() as u8;
                picture.fill((x, y), (CELL.0 - 1, CELL.1 - 1), share.map_or(MISSING, step));
                let number = share.map_or_else(String::new, |share| format!("{:.0}", 100.0 * share));
                picture.text((centred(x, &number), y + 8), TEXT, INK, &number);
            }
        }
    }
}
