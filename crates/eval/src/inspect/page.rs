//! The page: maps of all heads, the prompt coloured by what it lost, and a picture of each head.

use std::fmt::Write;

use long_context_page::heatmap::{HeatMap, Scale};
use long_context_page::{Page, escape};

use super::{HeadMass, Inspection};
use crate::{Picture, Result};

/// Steps of each colour ramp in the palette of a picture.
const STEPS: usize = 80;
/// Colours before the ramps: paper, and grey for keys that come after their rows.
const PAPER: u8 = 0;
const FUTURE: u8 = 1;
const RAMPS: usize = 2;
/// Mass below this share of a row is shown as none.
const FAINTEST: f64 = 1e-4;
/// Pixels between the three parts of a picture.
const GAP: usize = 3;
/// Width of a picture on the page.
const SHOWN: usize = 516;
/// Shades of the prompt's text.
const SHADES: usize = 5;
/// Tokens named below a head and below the prompt.
const NAMED: usize = 5;
const NAMED_OF_ALL: usize = 20;

impl Inspection {
    /// The page. `pieces` are the prompt's tokens as text.
    ///
    /// # Errors
    ///
    /// A picture that cannot be encoded.
    pub fn page(&self, model: &str, pieces: &[String]) -> Result<String> {
        let attention = &self.config.attention;
        let mut page = Page::new(&format!("What attention {} kept of a prompt", attention.name));
        page.paragraph(&format!(
            "{model}, {} tokens, layers {} to {}, {} heads. Kept {:.3} of all query-key pairs, which held {:.4} \
             of the attention, and {:.4} of that of the rows they were chosen from. Rows of attention were computed \
             exactly, {} of every {}.",
            self.tokens,
            self.config.layers.start(),
            self.heads.last().map_or(0, |head| head.layer),
            self.heads.len(),
            self.density(),
            self.recall(),
            self.mean(|head| f64::from(head.sampled)),
            self.config.rows_per_block.min(attention.options.block_size),
            attention.options.block_size
        ));
        self.maps(&mut page);
        self.prompt(&mut page, pieces);
        self.pictures(&mut page, pieces)?;
        Ok(page.finish())
    }

    fn maps(&self, page: &mut Page) {
        let heads = self.heads.iter().map(|head| head.head + 1).max().unwrap_or(0);
        let columns: Vec<String> = (0..heads).map(|head| head.to_string()).collect();
        let mut layers: Vec<usize> = self.heads.iter().map(|head| head.layer).collect();
        layers.dedup();
        let rows: Vec<String> = layers.iter().map(usize::to_string).collect();
        let map = |value: &dyn Fn(&HeadMass) -> f64, range, scale, decimals| {
            let mut cells = vec![vec![None; heads]; layers.len()];
            for head in &self.heads {
                let row = layers.iter().position(|layer| *layer == head.layer);
                if let Some(cells) = row.and_then(|row| cells.get_mut(row)) {
                    cells[head.head] = Some(value(head));
                }
            }
            HeatMap {
                rows: &rows,
                columns: &columns,
                row_title: "layer",
                column_title: "head",
                cells: &cells,
                range,
                scale,
                decimals: Some(decimals),
            }
            .svg()
        };
        page.heading("All heads");
        page.html("<div style=\"display:flex;flex-wrap:wrap;gap:1em 2em\">");
        let density = map(&|head| 100.0 * head.density(), (0.0, 100.0), Scale::Amount, 0);
        page.figure(&density, "Pairs computed, in percent of causal attention");
        let recall = map(&|head| 100.0 * head.recall(), (80.0, 100.0), Scale::Quality, 1);
        page.figure(&recall, "Attention kept, in percent, mean over rows");
        let worst = map(&|head| 100.0 * f64::from(head.worst.0), (0.0, 100.0), Scale::Quality, 0);
        page.figure(&worst, "Attention kept by the worst row, in percent");
        page.html("</div>");

        page.heading("Where rows lost attention");
        let cells: Vec<Vec<Option<f64>>> = layers.iter().map(|layer| self.lost_by_row(*layer)).collect();
        let highest = cells.iter().flatten().flatten().copied().fold(0.1, f64::max);
        let columns: Vec<String> =
            (0..self.grid.cells).map(|cell| (cell * self.grid.size).to_string()).collect();
        let lost = HeatMap {
            rows: &rows,
            columns: &columns,
            row_title: "layer",
            column_title: "position of the row",
            cells: &cells,
            range: (0.0, highest),
            scale: Scale::Loss,
            decimals: None,
        };
        let caption = format!(
            "Share of the attention that rows lost, mean over the heads of a layer: white is none, the darkest \
             red is {highest:.2}"
        );
        page.figure(&lost.svg(), &caption);
    }

    /// Share lost by the rows of each cell in one layer.
    fn lost_by_row(&self, layer: usize) -> Vec<Option<f64>> {
        let cells = self.grid.cells;
        let heads: Vec<&HeadMass> = self.heads.iter().filter(|head| head.layer == layer).collect();
        let share = |head: &&HeadMass, cell: usize| {
            let lost: f32 = head.lost[cell * cells..][..cells].iter().sum();
            let rows = head.rows_of_cell[cell];
            if rows == 0 { 0.0 } else { f64::from(lost) / f64::from(rows) }
        };
        (0..cells)
            .map(|cell| Some(heads.iter().map(|head| share(head, cell)).sum::<f64>() / heads.len() as f64))
            .collect()
    }

    /// The text, each token shaded by the attention that it should have got and did not.
    fn prompt(&self, page: &mut Page, pieces: &[String]) {
        let lost = self.lost_by_key();
        let rows: f64 = self.heads.iter().map(|head| head.rows as f64).sum();
        let all: f64 = lost.iter().sum();
        page.heading("What of the prompt was missed");
        if all == 0.0 {
            page.paragraph("Nothing: every key was attended to.");
            return;
        }
        let mut order: Vec<usize> = (0..lost.len()).collect();
        order.sort_by(|&a, &b| lost[b].total_cmp(&lost[a]));
        let named = order.iter().take(NAMED_OF_ALL).filter(|&&at| lost[at] > 0.0).map(|&at| {
            [
                at.to_string(),
                around(pieces, at),
                format!("{:.2}%", 100.0 * lost[at] / all),
                format!("{:.5}", lost[at] / rows),
            ]
        });
        page.paragraph(
            "Tokens that most attention to was dropped, over all heads: the token between its neighbours, its \
             share of everything dropped, and of the attention of a row on average.",
        );
        page.table(&["position", "token", "share of the loss", "of a row"], named);
        let highest = lost[order[0]];
        let shade = |at: usize| ((lost[at] / highest).sqrt() * (SHADES - 1) as f64).round() as usize;
        let mut text = "<details><summary>The whole prompt, shaded by loss</summary>\
                        <p style=\"white-space:pre-wrap;overflow-wrap:anywhere\">"
            .to_string();
        let mut from = 0;
        for at in 1..=pieces.len() {
            if at < pieces.len() && shade(at) == shade(from) {
                continue;
            }
            let run = escape(&pieces[from..at].concat());
            match shade(from) {
                0 => text += &run,
                level => {
                    let [red, green, blue] = Scale::Loss.colour(0.6 * level as f64 / (SHADES - 1) as f64);
                    let _ = write!(
                        text,
                        "<span style=\"background:#{red:02x}{green:02x}{blue:02x}\">{run}</span>"
                    );
                }
            }
            from = at;
        }
        page.html(&(text + "</p></details>"));
    }

    fn pictures(&self, page: &mut Page, pieces: &[String]) -> Result<()> {
        let heads = self.worst_first();
        page.heading("Head by head, those that lost most first");
        page.paragraph(&format!(
            "Three squares a head, rows of the prompt from top to bottom, keys from left to right, {} tokens a \
             cell. Left: where the attention is. Middle: the share of the pairs that was computed: bands run \
             along the diagonal, stripes are columns. Right: the attention that was lost. Colours of left and \
             right are logarithmic: the faintest is a ten-thousandth of a row's attention.",
            self.grid.size
        ));
        if heads.len() > self.config.max_heads {
            page.paragraph(&format!("Shown: {} of {} heads.", self.config.max_heads, heads.len()));
        }
        page.html("<div style=\"display:flex;flex-wrap:wrap;gap:0 2em\">");
        for head in heads.into_iter().take(self.config.max_heads) {
            let caption = self.caption(head, pieces);
            let image = format!(
                "<img src=\"{}\" width=\"{SHOWN}\" alt=\"\" style=\"image-rendering:pixelated\">",
                self.picture(head).data_uri()?
            );
            page.html(&format!(
                "<figure style=\"width:{SHOWN}px\">{image}<figcaption>{caption}</figcaption></figure>"
            ));
        }
        page.html("</div>");
        Ok(())
    }

    fn caption(&self, head: &HeadMass, pieces: &[String]) -> String {
        let mut caption = format!(
            "<b>Layer {}, head {}</b> kept {:.4}, worst row {:.3} at {}; density {:.3}, ",
            head.layer,
            head.head,
            head.recall(),
            head.worst.0,
            head.worst.1,
            head.density()
        );
        if head.dense {
            caption += "dense.";
            return caption;
        }
        let _ = write!(
            caption,
            "{} stripes, {} of {} bands, which kept {:.3} of the rows they were chosen from.",
            head.stripes, head.bands.0, head.bands.1, head.sampled
        );
        let mut order: Vec<usize> = (0..head.lost_by_key.len()).collect();
        order.sort_by(|&a, &b| head.lost_by_key[b].total_cmp(&head.lost_by_key[a]));
        let named = order.iter().take(NAMED).filter(|&&at| head.lost_by_key[at] > 0.0).map(|&at| {
            let piece = pieces.get(at).map_or("", String::as_str);
            let share = 100.0 * f64::from(head.lost_by_key[at]) / head.rows as f64;
            format!("{} at {at} ({share:.2}%)", escape(&format!("{piece:?}")))
        });
        let named: Vec<String> = named.collect();
        if !named.is_empty() {
            let _ = write!(caption, " Lost most: {}.", named.join(", "));
        }
        caption
    }

    /// The three squares of a head.
    fn picture(&self, head: &HeadMass) -> Picture {
        let cells = self.grid.cells;
        let mut palette = vec![[255; 3], [238; 3]];
        for scale in [Scale::Amount, Scale::Loss] {
            palette.extend((0..STEPS).map(|step| scale.colour(step as f64 / (STEPS - 1) as f64)));
        }
        let mut picture = Picture::new(3 * cells + 2 * GAP, cells, palette);
        let step = |share: f64| (share.clamp(0.0, 1.0) * (STEPS - 1) as f64).round() as usize;
        let logarithmic =
            |mass: f64| step(if mass <= FAINTEST { 0.0 } else { 1.0 - mass.log10() / FAINTEST.log10() });
        let parts = [0, cells + GAP, 2 * (cells + GAP)];
        picture.fill((0, 0), (3 * cells + 2 * GAP, cells), PAPER);
        for row in 0..cells {
            let rows = f64::from(head.rows_of_cell[row].max(1));
            for key in 0..cells {
                if key > row {
                    parts.iter().for_each(|left| picture.set(left + key, row, FUTURE));
                    continue;
                }
                let at = row * cells + key;
                let [pairs, kept] = head.pairs[at].map(f64::from);
                let share = if pairs == 0.0 { 0.0 } else { kept / pairs };
                let colours = [
                    RAMPS + logarithmic(f64::from(head.mass[at]) / rows),
                    // The square root shows a stripe of one column in a cell of many.
                    RAMPS + step(share.sqrt()),
                    RAMPS + STEPS + logarithmic(f64::from(head.lost[at]) / rows),
                ];
                for (left, colour) in parts.iter().zip(colours) {
                    picture.set(left + key, row, colour as u8);
                }
            }
        }
        picture
    }
}

/// A token between its neighbours.
fn around(pieces: &[String], at: usize) -> String {
    let part = |range: std::ops::Range<usize>| {
        pieces.get(range.start.min(pieces.len())..range.end.min(pieces.len())).unwrap_or(&[]).concat()
    };
    let text = format!("{}[{}]{}", part(at.saturating_sub(6)..at), part(at..at + 1), part(at + 1..at + 7));
    text.replace(['\n', '\r'], " ")
}
