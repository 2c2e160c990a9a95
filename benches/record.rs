//! Rows: the table on the terminal and JSON lines in a file.

use crate::Outcome;
use crate::lab::Result;
use crate::timing::{Mode, Role};
use serde::Serialize;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The commit that this binary was built from; `make bench` names it, and says if the tree had changes.
pub const COMMIT: &str = match option_env!("LORA_SWITCH_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// What does not apply is left out.
#[derive(Serialize)]
pub struct Row {
    case: String,
    mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    floor_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gap_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gap_floor_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    loop_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    loop_floor_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    checked: Option<bool>,
    gpu: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    clock_mhz: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    power_w: Option<f64>,
    commit: &'static str,
}

fn rounded(x: f64) -> f64 {
    (x * 1e3).round() / 1e3
}

impl Row {
    pub fn new(case: &str, outcome: &Outcome, gpu: &str) -> Self {
        let us = |mode, role| outcome.figures.us(mode, role).map(rounded);
        let reading = outcome.figures.reading;
        Self {
            case: case.to_owned(),
            mode: "token",
            us: us(Mode::Token, Role::Case),
            floor_us: us(Mode::Token, Role::Floor),
            peer: outcome.figures.peer.clone(),
            peer_us: us(Mode::Token, Role::Peer),
            base_us: us(Mode::Token, Role::Base),
            gap_us: us(Mode::Gap, Role::Case),
            gap_floor_us: us(Mode::Gap, Role::Floor),
            loop_us: us(Mode::Loop, Role::Case),
            loop_floor_us: us(Mode::Loop, Role::Floor),
            checked: outcome.checked,
            gpu: gpu.to_owned(),
            clock_mhz: reading.map(|r| r.clock_mhz),
            power_w: reading.map(|r| rounded(r.power_w)),
            commit: COMMIT,
        }
    }

    fn print(&self, width: usize) {
        let number = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.2}"));
        let ratio = |a: Option<f64>, b: Option<f64>| a.zip(b).map_or("-".into(), |(a, b)| format!("{:.3}", a / b));
        let checked = self.checked.map_or("-", |good| if good { "yes" } else { "FAILED" });
        println!(
            "{:width$} {:>10} {:>10} {:>7} {:>10} {:>7} {:>10} {:>7} {:>10} {:>7} {:>10} {:>7} {:>6} {:>6} {checked}",
            self.case,
            number(self.us),
            number(self.floor_us),
            ratio(self.us, self.floor_us),
            number(self.peer_us),
            ratio(self.peer_us, self.us),
            number(self.base_us),
            ratio(self.us, self.base_us),
            number(self.gap_us),
            ratio(self.gap_us, self.gap_floor_us),
            number(self.loop_us),
            ratio(self.loop_us, self.loop_floor_us),
            self.clock_mhz.map_or("-".into(), |mhz| mhz.to_string()),
            self.power_w.map_or("-".into(), |w| format!("{w:.0}")),
        );
    }
}

fn print_header(width: usize) {
    println!(
        "{:width$} {:>10} {:>10} {:>7} {:>10} {:>7} {:>10} {:>7} {:>10} {:>7} {:>10} {:>7} {:>6} {:>6} checked",
        "case", "us", "floor us", "/floor", "peer us", "faster", "base us", "/base", "gap us", "/floor", "loop us", "/floor", "MHz", "W"
    );
}

pub struct Recorder {
    file: Option<File>,
    /// Of the longest case's name.
    width: usize,
}

impl Recorder {
    /// Into a file, or into a new file of a directory. The table's header is for cases with names of this
    /// width; 0 if there are none.
    pub fn new(path: Option<&Path>, gpu: &str, width: usize) -> Result<Self> {
        let file = path.map(|path| Self::create(path, gpu)).transpose()?;
        if width > 0 {
            print_header(width);
        }
        Ok(Self { file, width })
    }

    fn create(path: &Path, gpu: &str) -> Result<File> {
        let is_dir = path.is_dir() || path.extension().is_none();
        let path = if is_dir { path.join(file_name(gpu)) } else { PathBuf::from(path) };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        println!("recording to {}", path.display());
        Ok(File::create(path)?)
    }

    /// At once, so that a run that is cut short leaves what it has.
    pub fn row(&mut self, row: &Row) -> Result<()> {
        row.print(self.width);
        self.line(row)
    }

    pub fn line(&mut self, line: &impl Serialize) -> Result<()> {
        if let Some(file) = &mut self.file {
            writeln!(file, "{}", serde_json::to_string(line).expect("plain numbers and strings"))?;
        }
        Ok(())
    }
}

/// Sorts by time: 20260131T235959Z-nvidia-h200.jsonl.
fn file_name(gpu: &str) -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_secs();
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let gpu: String = gpu.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z-{gpu}.jsonl")
}

/// Year, month and day of a day after 1970-01-01.
fn date(mut days: u64) -> (u64, u64, u64) {
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, month as u64 + 1, days + 1)
}
