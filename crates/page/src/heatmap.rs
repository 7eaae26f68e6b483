//! Heat maps: a grid of coloured cells with their numbers.

use std::fmt::Write;

use crate::escape;

/// What colours mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Low is red, high is green.
    Quality,
    /// Low is white, high is blue.
    Amount,
    /// Low is white, high is red.
    Loss,
}

impl Scale {
    /// The colour of a share of the range, red, green and blue.
    pub fn colour(self, share: f64) -> [u8; 3] {
        let stops: [[f64; 3]; 3] = match self {
            Self::Quality => [[215.0, 48.0, 39.0], [254.0, 224.0, 110.0], [52.0, 160.0, 84.0]],
            Self::Amount => [[255.0, 255.0, 255.0], [146.0, 190.0, 222.0], [8.0, 64.0, 129.0]],
            Self::Loss => [[255.0, 255.0, 255.0], [250.0, 160.0, 120.0], [165.0, 15.0, 21.0]],
        };
        let at = if share.is_nan() { 0.0 } else { share.clamp(0.0, 1.0) } * 2.0;
        let (from, to) = if at < 1.0 { (stops[0], stops[1]) } else { (stops[1], stops[2]) };
        let part = at - f64::from(at >= 1.0);
        std::array::from_fn(|channel| (from[channel] + (to[channel] - from[channel]) * part).round() as u8)
    }
}

/// A grid of numbers.
#[derive(Debug, Clone)]
pub struct HeatMap<'a> {
    /// Labels from top to bottom.
    pub rows: &'a [String],
    /// Labels from left to right.
    pub columns: &'a [String],
    /// What rows are.
    pub row_title: &'a str,
    /// What columns are.
    pub column_title: &'a str,
    /// Rows of numbers; `None` is left grey.
    pub cells: &'a [Vec<Option<f64>>],
    /// The numbers that take the first and the last colour.
    pub range: (f64, f64),
    /// The colours.
    pub scale: Scale,
    /// Whether cells show their numbers, and with how many decimals.
    pub decimals: Option<usize>,
}

const CELL_HEIGHT: usize = 24;
const LEFT: usize = 70;
const TOP: usize = 40;
/// Room for columns; with few, cells are no wider than this allows.
const WIDTH: usize = 900;
const WIDEST_CELL: usize = 48;

impl HeatMap<'_> {
    /// The map as a plot.
    pub fn svg(&self) -> String {
        let columns = self.columns.len().max(1);
        let cell = (WIDTH / columns).clamp(6, WIDEST_CELL);
        let (width, height) = (LEFT + cell * columns + 10, TOP + CELL_HEIGHT * self.rows.len() + 10);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\">\n\
             <text x=\"{LEFT}\" y=\"14\">{}</text><text x=\"4\" y=\"32\">{}</text>\n",
            escape(self.column_title),
            escape(self.row_title)
        );
        // Where labels would run into each other, some are left out.
        let longest = self.columns.iter().map(|label| label.chars().count()).max().unwrap_or(0);
        let every = (longest * 7 + 6).div_ceil(cell).max(1);
        for (index, label) in self.columns.iter().enumerate().step_by(every) {
            let x = LEFT + cell * index + cell / 2;
            let _ = write!(svg, "<text x=\"{x}\" y=\"32\" text-anchor=\"middle\">{}</text>", escape(label));
        }
        svg.push('\n');
        for (index, (label, cells)) in self.rows.iter().zip(self.cells).enumerate() {
            let y = TOP + CELL_HEIGHT * index;
            let _ = write!(
                svg,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
                LEFT - 6,
                y + 16,
                escape(label)
            );
            for (index, value) in cells.iter().enumerate() {
                self.cell(&mut svg, LEFT + cell * index, y, cell, *value);
            }
            svg.push('\n');
        }
        svg + "</svg>"
    }

    fn cell(&self, svg: &mut String, x: usize, y: usize, width: usize, value: Option<f64>) {
        let (low, high) = self.range;
        let colour = value.map_or([221; 3], |value| self.scale.colour((value - low) / (high - low)));
        let [red, green, blue] = colour;
        let _ = write!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"#{red:02x}{green:02x}{blue:02x}\"/>",
            width - 1,
            CELL_HEIGHT - 1
        );
        let (Some(value), Some(decimals)) = (value, self.decimals) else { return };
        let light = 0.3 * f64::from(red) + 0.59 * f64::from(green) + 0.11 * f64::from(blue);
        let ink = if light < 120.0 { " style=\"fill:#fff\"" } else { "" };
        let _ = write!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\"{ink}>{value:.decimals$}</text>",
            x + width / 2,
            y + 16
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_run_through_their_stops() {
        assert_eq!(Scale::Quality.colour(0.0), [215, 48, 39]);
        assert_eq!(Scale::Quality.colour(0.5), [254, 224, 110]);
        assert_eq!(Scale::Quality.colour(1.0), [52, 160, 84]);
        assert_eq!(Scale::Loss.colour(-3.0), [255; 3]);
        assert_eq!(Scale::Amount.colour(9.0), [8, 64, 129]);
        assert_eq!(Scale::Amount.colour(f64::NAN), [255; 3]);
    }

    #[test]
    fn a_cell_shows_its_number_or_stays_grey() {
        let labels = ["<a>".to_string(), "b".to_string()];
        let svg = HeatMap {
            rows: &labels,
            columns: &labels,
            row_title: "rows",
            column_title: "columns",
            cells: &[vec![Some(0.0), Some(100.0)], vec![None, Some(50.0)]],
            range: (0.0, 100.0),
            scale: Scale::Quality,
            decimals: Some(0),
        }
        .svg();
        assert_eq!(svg.matches("<rect").count(), 4);
        for text in [">100<", ">50<", "#d73027", "#34a054", "#dddddd", "&lt;a&gt;"] {
            assert!(svg.contains(text), "{text} in {svg}");
        }
    }
}
