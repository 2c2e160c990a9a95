//! A plot on two logarithmic axes, as SVG: a few lines of text, the same for the same points.

use std::fmt::Write;

/// Measured points, joined by a line.
pub struct Series {
    pub name: String,
    pub color: &'static str,
    /// Of positive numbers, in order of x.
    pub points: Vec<(f64, f64)>,
}

pub struct Plot<'a> {
    pub title: &'a str,
    pub x_axis: &'a str,
    pub y_axis: &'a str,
    /// Where the points come from.
    pub source: &'a str,
    pub series: &'a [Series],
}

const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 460.0;
/// Of the frame: left, right, top, bottom.
const FRAME: [f64; 4] = [70.0, 560.0, 50.0, 390.0];
/// Between labels, at least.
const LINE: f64 = 18.0;

/// Places on an axis from a value at one pixel to a value at another.
#[derive(Clone, Copy)]
struct Scale {
    values: [f64; 2],
    pixels: [f64; 2],
}

impl Scale {
    fn new(values: impl Iterator<Item = f64> + Clone, room: f64, pixels: [f64; 2]) -> Self {
        let (low, high) = (values.clone().fold(f64::INFINITY, f64::min), values.fold(0.0, f64::max));
        assert!(low > 0.0 && high.is_finite(), "{low} to {high}");
        Self { values: [low / room, high * room], pixels }
    }

    fn at(&self, value: f64) -> f64 {
        let [low, high] = self.values.map(f64::ln);
        let [from, to] = self.pixels;
        from + (value.ln() - low) / (high - low) * (to - from)
    }

    /// The steps of every power that are in range.
    fn ticks(&self, steps: &[f64], base: f64) -> Vec<f64> {
        let all = (-12..40).flat_map(|power| steps.iter().map(move |step| step * base.powi(power)));
        all.filter(|tick| (self.values[0]..=self.values[1]).contains(tick)).collect()
    }
}

pub fn draw(plot: &Plot<'_>) -> String {
    let [left, right, top, bottom] = FRAME;
    let points = || plot.series.iter().flat_map(|series| series.points.iter().copied());
    let x = Scale::new(points().map(|(x, _)| x), 1.1, [left, right]);
    let y = Scale::new(points().map(|(_, y)| y), 1.15, [bottom, top]);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    let text = |svg: &mut String, x: f64, y: f64, more: &str, what: &str| {
        writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {more}>{what}</text>").expect("memory");
    };
    text(&mut svg, left, 28.0, "font-size=\"16\"", plot.title);
    for tick in x.ticks(&[1.0], 2.0) {
        let at = x.at(tick);
        svg += &format!("<path d=\"M{at:.1} {top}V{bottom}\" stroke=\"#ddd\"/>\n");
        text(&mut svg, at, bottom + LINE, "text-anchor=\"middle\"", &format!("{tick}"));
    }
    for tick in y.ticks(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0], 10.0) {
        let at = y.at(tick);
        svg += &format!("<path d=\"M{left} {at:.1}H{right}\" stroke=\"#ddd\"/>\n");
        text(&mut svg, left - 8.0, at + 4.0, "text-anchor=\"end\"", &format!("{}", (tick * 1e6).round() / 1e6));
    }
    svg += &format!("<path d=\"M{left} {top}V{bottom}H{right}\" fill=\"none\" stroke=\"#444\"/>\n");
    text(&mut svg, (left + right) / 2.0, bottom + 2.2 * LINE, "text-anchor=\"middle\"", plot.x_axis);
    let (middle, turned) = ((top + bottom) / 2.0, 24.0);
    text(&mut svg, turned, middle, &format!("text-anchor=\"middle\" transform=\"rotate(-90 {turned} {middle})\""), plot.y_axis);
    text(&mut svg, left, HEIGHT - 10.0, "font-size=\"10\" fill=\"#666\"", plot.source);

    for series in plot.series {
        let places: Vec<String> = series.points.iter().map(|&(px, py)| format!("{:.1} {:.1}", x.at(px), y.at(py))).collect();
        svg += &format!("<path d=\"M{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"/>\n", places.join("L"), series.color);
        for &(px, py) in &series.points {
            let (cx, cy) = (x.at(px), y.at(py));
            let what = format!("<title>{}: {px}, {py:.3}</title>", series.name);
            svg += &format!("<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"4\" fill=\"{}\">{what}</circle>\n", series.color);
        }
    }
    // Names stand where their lines end, but not on each other.
    let end = |series: &Series| y.at(series.points.last().expect("a series has points").1);
    let mut ends: Vec<(f64, &Series)> = plot.series.iter().map(|series| (end(series), series)).collect();
    ends.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut free = top;
    for (at, series) in ends {
        let at = at.max(free);
        text(&mut svg, right + 10.0, at + 4.0, &format!("fill=\"{}\"", series.color), &series.name);
        free = at + LINE;
    }
    svg + "</svg>\n"
}

/// Decades and doublings are as far apart as each other, names do not collide, and what is drawn is what was given.
#[test]
fn places_are_logarithmic() {
    let line = |name: &str, points: &[(f64, f64)]| Series { name: name.into(), color: "#123456", points: points.to_vec() };
    let series = [line("falls", &[(1.0, 10.0), (2.0, 1.0), (4.0, 0.1)]), line("flat", &[(1.0, 0.1), (4.0, 0.1)])];
    let plot = Plot { title: "t", x_axis: "x", y_axis: "y", source: "s", series: &series };
    let svg = draw(&plot);
    let numbers =
        |what: &str| -> Vec<f64> { svg.split(what).skip(1).map(|rest| rest.split('"').next().unwrap().parse().unwrap()).collect() };
    let (cx, cy) = (numbers("cx=\""), numbers("cy=\""));
    assert_eq!(cx.len(), 5);
    assert!((cx[1] - cx[0] - (cx[2] - cx[1])).abs() < 0.2 && cx[1] > cx[0], "{cx:?}");
    assert!((cy[1] - cy[0] - (cy[2] - cy[1])).abs() < 0.2 && cy[1] > cy[0], "{cy:?}");
    assert_eq!((cx[3], cx[4], cy[3], cy[4]), (cx[0], cx[2], cy[2], cy[2]));
    assert!(cx.iter().all(|x| (FRAME[0]..=FRAME[1]).contains(x)) && cy.iter().all(|y| (FRAME[2]..=FRAME[3]).contains(y)));
    assert_eq!((svg.matches("<text").count(), svg.matches(">4</text>").count()), (4 + 3 + 15 + 2, 2), "{svg}");
    let labels: Vec<f64> = ["falls", "flat"]
        .map(|name| {
            let before = svg.split(&format!(">{name}</text>")).next().unwrap();
            before.rsplit("y=\"").next().unwrap().split('"').next().unwrap().parse().unwrap()
        })
        .to_vec();
    assert!((labels[0] - labels[1]).abs() >= LINE - 0.1, "{labels:?}");
    assert_eq!(svg, draw(&plot));
}
