//! README's tables of figures and its plot are made from benches/record: of each case the newest row. Compared with what the records say
//! now; LORA_SWITCH_REGENERATE=1 (`make gen`) writes them instead.

use crate::generated::check;
use crate::plot::{Plot, Series, draw};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::fs;

/// Of a line of a record, what a table shows.
#[derive(Deserialize, Clone)]
struct Row {
    case: String,
    us: Option<f64>,
    floor_us: Option<f64>,
    base_us: Option<f64>,
    peer: Option<String>,
    peer_us: Option<f64>,
    checked: Option<bool>,
    gpu: String,
    commit: String,
    #[serde(skip)]
    record: String,
}

/// In the order of their first appearance. Names of records sort by time, so a later row takes an earlier one's place.
fn newest_rows() -> Vec<Row> {
    let names = fs::read_dir("benches/record").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut rows = Vec::<Row>::new();
    for name in names.filter(|name| name.ends_with(".jsonl")).collect::<BTreeSet<_>>() {
        let text = fs::read_to_string(format!("benches/record/{name}")).unwrap();
        // Lines of another kind have no case.
        for line in text.lines().filter(|line| line.starts_with("{\"case\"")) {
            let row = Row { record: name.clone(), ..serde_json::from_str(line).unwrap() };
            assert_ne!(row.checked, Some(false), "{name}: {}", row.case);
            match rows.iter_mut().find(|known| known.case == row.case) {
                Some(known) => *known = row,
                None => rows.push(row),
            }
        }
    }
    rows
}

fn time(us: f64) -> String {
    if us >= 1e3 { format!("{:.2} ms", us / 1e3) } else { format!("{us:.2} us") }
}

fn ratio(a: Option<f64>, b: Option<f64>, unit: &str) -> String {
    a.zip(b).map_or_else(|| "-".into(), |(a, b)| format!("{:.3}{unit}", a / b))
}

/// The rows of cases that begin so, and where they come from.
fn table(prefix: &str, rows: &[Row]) -> String {
    let rows: Vec<&Row> = rows.iter().filter(|row| row.case.starts_with(prefix)).collect();
    assert!(!rows.is_empty(), "no record has {prefix}");
    let mut text =
        "| case | time | over the floor | over the base | peer | its time | faster |\n|---|---|---|---|---|---|---|\n".to_owned();
    for row in &rows {
        text += &format!(
            "| {} | {} | {} | {} | {} | {} | {} |\n",
            row.case,
            row.us.map_or_else(|| "-".into(), time),
            ratio(row.us, row.floor_us, ""),
            ratio(row.us, row.base_us, ""),
            row.peer.as_deref().unwrap_or("-"),
            row.peer_us.map_or_else(|| "-".into(), time),
            ratio(row.peer_us, row.us, "x"),
        );
    }
    text + "\n" + &source(&rows) + ".\n"
}

fn source(rows: &[&Row]) -> String {
    let sources: BTreeSet<_> = rows.iter().map(|row| format!("{} of commit {} on {}", row.record, row.commit, row.gpu)).collect();
    "From benches/record: ".to_owned() + &Vec::from_iter(sources).join("; ")
}

const BEGIN: &str = "<!-- figures: ";
const END: &str = "<!-- end of figures -->";

#[test]
fn are_those_of_the_record() {
    let readme = fs::read_to_string("README.md").unwrap();
    let rows = newest_rows();
    let mut parts = readme.split(BEGIN);
    let mut fresh = parts.next().unwrap().to_owned();
    for part in parts {
        let (prefix, rest) = part.split_once(" -->").expect("a marker ends");
        let (_, after) = rest.split_once(END).expect("a table ends");
        fresh += &format!("{BEGIN}{prefix} -->\n\n{}\n{END}{after}", table(prefix, &rows));
    }
    assert!(fresh.contains(END), "README.md has figures");
    check("README.md", &fresh, str::to_owned);
}

const CROSSOVER: &str = "crossover/7b/r16/k2/";
/// Strategies as the cases name them, with what the plot calls them.
const STRATEGIES: [(&str, &str, &str); 4] = [
    ("switch", "switch, cuBLAS products", "#c0392b"),
    ("switch-linear", "switch, linear without adapters", "#e67e22"),
    ("apply", "cuBLAS products, apply", "#2471a3"),
    ("linear", "linear", "#1e8449"),
];

/// Milliseconds a token, by how many tokens a route serves.
fn crossover(rows: &[Row]) -> String {
    let rows: Vec<&Row> = rows.iter().filter(|row| row.case.starts_with(CROSSOVER)).collect();
    let points = |strategy: &str, of: fn(&Row) -> Option<f64>| {
        let tokens = |row: &Row| row.case[CROSSOVER.len()..].strip_prefix(strategy)?.strip_prefix("/R")?.parse::<f64>().ok();
        let mut points: Vec<(f64, f64)> = rows.iter().filter_map(|row| Some((tokens(row)?, of(row).expect("a time") / 1e3))).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    };
    let mut series: Vec<Series> = (STRATEGIES.into_iter())
        .map(|(strategy, name, color)| Series { name: name.into(), color, points: points(strategy, |row| row.us) })
        .collect();
    series.push(Series { name: "cuBLAS products, no adapters".into(), color: "#7f8c8d", points: points("apply", |row| row.base_us) });
    assert!(series.iter().all(|series| !series.points.is_empty()), "a strategy without rows in benches/record");
    draw(&Plot {
        title: "Llama-2-7B, one sequence, bf16, 2 adapters of rank 16 a token",
        x_axis: "tokens that a route serves",
        y_axis: "milliseconds a token",
        source: &source(&rows),
        series: &series,
    })
}

#[test]
fn crossover_is_that_of_the_record() {
    check("docs/crossover.svg", &crossover(&newest_rows()), str::to_owned);
}
