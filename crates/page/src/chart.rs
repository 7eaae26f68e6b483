//! Plots as inline SVG.

use std::fmt::Write;

use crate::escape;

/// Colours that stay apart for readers who confuse red with green.
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#333333", "#8a2be2"];
const DASHES: [&str; 3] = ["none", "7 4", "2 4"];
const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 48.0;
const LINE: f64 = 18.0;
/// Width of a letter, about.
const LETTER: f64 = 6.6;
/// Letters of the name of a bar, at most.
const LONGEST_NAME: usize = 72;

/// Points of one line.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// What the legend says.
    pub name: String,
    /// From left to right.
    pub points: Vec<(f64, f64)>,
}

/// Lines over a logarithmic horizontal axis.
#[derive(Debug, Clone)]
pub struct LineChart<'a> {
    /// Below the horizontal axis.
    pub x_label: &'a str,
    /// Above the vertical axis.
    pub y_label: &'a str,
    /// Whether the vertical axis is logarithmic too; otherwise it begins at 0.
    pub log_y: bool,
    /// The lines.
    pub series: Vec<Series>,
}

impl LineChart<'_> {
    /// The plot; empty where there is no point that can be drawn.
    pub fn svg(&self) -> String {
        let drawable = |&(x, y): &(f64, f64)| x > 0.0 && y.is_finite() && (y > 0.0 || !self.log_y);
        let series: Vec<Series> = self
            .series
            .iter()
            .map(|series| Series {
                name: series.name.clone(),
                points: series.points.iter().copied().filter(drawable).collect(),
            })
            .filter(|series| !series.points.is_empty())
            .collect();
        let points = || series.iter().flat_map(|series| series.points.iter().copied());
        let (Some(x_range), Some(y_range)) = (range(points().map(|p| p.0)), range(points().map(|p| p.1)))
        else {
            return String::new();
        };
        let legend = LINE * series.len() as f64;
        let mut svg = open(HEIGHT + legend, self.y_label);
        let mut lengths: Vec<f64> = points().map(|point| point.0).collect();
        lengths.sort_by(f64::total_cmp);
        lengths.dedup();
        let x_at = |x: f64| LEFT + (WIDTH - LEFT - RIGHT) * fraction(x.ln(), x_range.0.ln(), x_range.1.ln());
        let (bottom, ticks) =
            if self.log_y { (y_range.0.log10().floor(), powers(y_range)) } else { (0.0, steps(y_range.1)) };
        let scale = |y: f64| if self.log_y { y.log10() } else { y };
        let top = ticks.last().copied().map_or(1.0, scale).max(bottom + f64::EPSILON);
        let y_at = |y: f64| HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * fraction(scale(y), bottom, top);
        for tick in ticks {
            let y = y_at(tick);
            let _ = write!(
                svg,
                "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 8.0,
                y + 4.0,
                short(tick)
            );
        }
        let mut last_label = f64::NEG_INFINITY;
        for length in lengths {
            let x = x_at(length);
            let _ = write!(
                svg,
                "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"#999\"/>",
                HEIGHT - BOTTOM,
                HEIGHT - BOTTOM + 5.0
            );
            if x - last_label > 40.0 {
                last_label = x;
                let _ = write!(
                    svg,
                    "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                    HEIGHT - BOTTOM + 20.0,
                    tokens(length)
                );
            }
        }
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 8.0,
            escape(self.x_label)
        );
        for (index, series) in series.iter().enumerate() {
            let (colour, dash) = style(index);
            let at: Vec<(f64, f64)> = series.points.iter().map(|&(x, y)| (x_at(x), y_at(y))).collect();
            let path: Vec<String> = at.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let _ = write!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" \
                 stroke-dasharray=\"{dash}\"/>",
                path.join(" ")
            );
            for (x, y) in at {
                let _ = write!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>");
            }
            let y = HEIGHT + LINE * index as f64 + 8.0;
            let _ = write!(
                svg,
                "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\" stroke=\"{colour}\" stroke-width=\"2\" \
                 stroke-dasharray=\"{dash}\"/><text x=\"{}\" y=\"{}\">{}</text>",
                LEFT + 36.0,
                LEFT + 46.0,
                y + 4.0,
                escape(&series.name)
            );
        }
        svg + "</svg>"
    }
}

/// A bar made of parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Bar {
    /// What stands to its left.
    pub name: String,
    /// The parts from left to right, as many as the chart names.
    pub parts: Vec<f64>,
    /// What stands to its right.
    pub note: String,
}

/// Horizontal bars, all of one length where shares are shown.
#[derive(Debug, Clone)]
pub struct BarChart<'a> {
    /// Names of the parts; one part needs none.
    pub parts: Vec<&'a str>,
    /// The bars from above.
    pub bars: Vec<Bar>,
    /// Whether each bar is as long as the others, its parts shares of it.
    pub shares: bool,
}

impl BarChart<'_> {
    /// The plot; empty where there is no bar.
    pub fn svg(&self) -> String {
        const NOTE: f64 = 120.0;
        const ROW: f64 = 24.0;
        let sum = |bar: &Bar| bar.parts.iter().sum::<f64>();
        let longest = self.bars.iter().map(sum).fold(0.0, f64::max);
        let names: Vec<String> = self.bars.iter().map(|bar| shortened(&bar.name)).collect();
        let letters = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
        let left = LETTER * letters as f64 + 16.0;
        if longest <= 0.0 || !longest.is_finite() {
            return String::new();
        }
        let legend = if self.parts.len() > 1 { ROW } else { 0.0 };
        let mut svg = open(legend + ROW * self.bars.len() as f64 + 8.0, &self.parts.join(", "));
        if legend > 0.0 {
            for (index, part) in self.parts.iter().enumerate() {
                let x = WIDTH - NOTE - 130.0 * (self.parts.len() - index) as f64;
                let _ = write!(
                    svg,
                    "<rect x=\"{x}\" y=\"4\" width=\"14\" height=\"14\" fill=\"{}\"/><text x=\"{}\" y=\"16\">{}</text>",
                    style(index).0,
                    x + 20.0,
                    escape(part)
                );
            }
        }
        for (index, (bar, name)) in self.bars.iter().zip(&names).enumerate() {
            let y = legend + ROW * index as f64;
            let whole = if self.shares { sum(bar) } else { longest };
            let _ = write!(
                svg,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
                left - 8.0,
                y + 17.0,
                escape(name)
            );
            let mut x = left;
            for (part, value) in bar.parts.iter().enumerate().filter(|(_, value)| **value > 0.0) {
                let width = (WIDTH - left - NOTE) * value / whole;
                let _ = write!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{}\" width=\"{width:.1}\" height=\"{}\" fill=\"{}\"/>",
                    y + 3.0,
                    ROW - 6.0,
                    style(part).0
                );
                x += width;
            }
            let _ = write!(svg, "<text x=\"{:.1}\" y=\"{}\">{}</text>", x + 8.0, y + 17.0, escape(&bar.note));
        }
        svg + "</svg>"
    }
}

fn open(height: f64, title: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" role=\"img\"><title>{}</title>",
        escape(title)
    )
}

/// A name without its middle where it is too long to stand beside a bar.
fn shortened(name: &str) -> String {
    let letters: Vec<char> = name.chars().collect();
    if letters.len() <= LONGEST_NAME {
        return name.to_string();
    }
    let (first, last) = (&letters[..LONGEST_NAME / 2], &letters[letters.len() - LONGEST_NAME / 2 + 1..]);
    first.iter().chain(&['…']).chain(last).collect()
}

/// Colour and dashes of the line or part of this number.
fn style(index: usize) -> (&'static str, &'static str) {
    (COLOURS[index % COLOURS.len()], DASHES[index / COLOURS.len() % DASHES.len()])
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |range, value| {
        let (low, high) = range.unwrap_or((value, value));
        Some((low.min(value), high.max(value)))
    })
}

/// Where a value stands between two others; in the middle where they are one.
fn fraction(value: f64, low: f64, high: f64) -> f64 {
    if high > low { (value - low) / (high - low) } else { 0.5 }
}

/// Round numbers from 0 to at least `high`, a handful.
fn steps(high: f64) -> Vec<f64> {
    let rough = high.max(f64::MIN_POSITIVE) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|n| n * power).into_iter().find(|&step| step >= rough);
    let step = step.unwrap_or(rough);
    (0..=(high / step).ceil() as usize).map(|n| n as f64 * step).collect()
}

/// Powers of ten from at most `low` to at least `high`.
fn powers((low, high): (f64, f64)) -> Vec<f64> {
    let first = low.log10().floor() as i32;
    let last = (high.log10().ceil() as i32).max(first + 1);
    (first..=last).map(|power| 10f64.powi(power)).collect()
}

/// A number without digits that say nothing.
fn short(value: f64) -> String {
    let text = format!("{value:.3}");
    if value >= 1000.0 {
        format!("{value:.0}")
    } else {
        text.trim_end_matches('0').trim_end_matches('.').to_string()
    }
}

/// A length in tokens: 8192 is 8k.
fn tokens(length: f64) -> String {
    if length >= 1024.0 && length % 1024.0 == 0.0 { format!("{}k", length / 1024.0) } else { short(length) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>, log_y: bool) -> String {
        let series = vec![Series { name: "a < b".to_string(), points }];
        LineChart { x_label: "tokens", y_label: "times", log_y, series }.svg()
    }

    #[test]
    fn lines_have_a_legend_and_labelled_axes() {
        let svg = chart(vec![(8192.0, 1.0), (32768.0, 2.5)], false);
        for text in [">8k<", ">32k<", ">0<", ">2.5<", "a &lt; b", "<polyline", "</svg>"] {
            assert!(svg.contains(text), "no {text} in {svg}");
        }
    }

    #[test]
    fn what_cannot_be_drawn_is_left_out() {
        assert_eq!(chart(vec![], false), "");
        assert_eq!(chart(vec![(8192.0, f64::NAN)], false), "");
        assert_eq!(chart(vec![(8192.0, 0.0)], true), "");
        assert!(chart(vec![(8192.0, 3.0)], true).contains("<circle"));
        assert_eq!(BarChart { parts: vec![], bars: vec![], shares: true }.svg(), "");
    }

    #[test]
    fn long_names_lose_their_middle() {
        assert_eq!(shortened("dense"), "dense");
        let name = shortened(&format!("{}{}", "a".repeat(60), "b".repeat(60)));
        assert_eq!(name.chars().count(), LONGEST_NAME);
        assert!(name.starts_with("aa") && name.contains("a…b") && name.ends_with("bb"), "{name}");
    }

    #[test]
    fn shares_fill_the_bar() {
        let bar = |parts| Bar { name: String::new(), parts, note: "note".to_string() };
        let chart = BarChart { parts: vec!["a", "b"], bars: vec![bar(vec![1.0, 1.0])], shares: true };
        // What is left of 900 for two halves beside 16 for the names and 120 for the notes.
        assert_eq!(chart.svg().matches("width=\"382.0\"").count(), 2, "{}", chart.svg());
    }
}
