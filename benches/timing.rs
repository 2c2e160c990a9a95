//! Time on the device: graphs between events on one stream, no wait of the host in between.

use crate::lab::{Lab, Result};
use crate::sensors::Reading;
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaEvent, CudaGraph, result};
use std::cell::Cell;
use std::ffi::c_void;
use std::time::Duration;

/// What comes before each timed launch. It decides clocks, power and caches: no figure goes without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A pass that reads 12.95 GB of other memory, as a decode step does: what a user sees.
    Token,
    /// 40 ms of an idle card.
    Gap,
    /// The same launch.
    Loop,
}

impl Mode {
    pub fn parse(name: &str) -> std::result::Result<Self, String> {
        match name {
            "token" => Ok(Self::Token),
            "gap" => Ok(Self::Gap),
            "loop" => Ok(Self::Loop),
            other => Err(format!("{other} is no mode: token, gap or loop")),
        }
    }
}

/// Who is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Case,
    /// What no kernel of this job can beat.
    Floor,
    /// What a user would run instead.
    Peer,
    /// What runs without the job at all.
    Base,
}

/// Graphs that take turns, so that each launch finds the other's result and has all its work to do.
pub struct Work {
    graphs: Vec<CudaGraph>,
    /// Equal pieces of work in a graph: a figure is for one.
    nodes: usize,
    turn: Cell<usize>,
}

impl Work {
    pub fn new(graphs: Vec<CudaGraph>, nodes: usize) -> Self {
        Self { graphs, nodes, turn: Cell::new(0) }
    }

    fn launch(&self) -> Result<()> {
        let turn = self.turn.replace(self.turn.get() + 1);
        Ok(self.graphs[turn % self.graphs.len()].launch()?)
    }
}

/// A case and what it is measured against.
#[derive(Default)]
pub struct Subject {
    pub works: Vec<(Role, Work)>,
    /// The peer's name.
    pub peer: Option<String>,
}

/// Microseconds by mode and role, and how the card was doing in the first of the modes.
#[derive(Debug, Default)]
pub struct Figures {
    times: Vec<(Mode, Role, f64)>,
    pub peer: Option<String>,
    pub reading: Option<Reading>,
}

impl Figures {
    pub fn us(&self, mode: Mode, role: Role) -> Option<f64> {
        self.times.iter().find(|(m, r, _)| (*m, *r) == (mode, role)).map(|(_, _, us)| *us)
    }
}

/// What the command line and the case agreed on.
pub struct Timing {
    pub modes: Vec<Mode>,
    pub repetitions: usize,
}

impl Timing {
    pub fn measure(&self, lab: &Lab, subject: &Subject) -> Result<Figures> {
        let mut figures = Figures { peer: subject.peer.clone(), ..Figures::default() };
        for &mode in &self.modes {
            let time = || self.time(lab, mode, subject);
            let (medians, reading) = match &lab.sensors {
                Some(sensors) => sensors.watch(time),
                None => (time(), None),
            };
            figures.times.extend(subject.works.iter().zip(medians?).map(|((role, _), us)| (mode, *role, us)));
            figures.reading = figures.reading.or(reading);
        }
        Ok(figures)
    }

    /// The median of each work. All are timed in turns: whatever the card does, it does to all of them.
    fn time(&self, lab: &Lab, mode: Mode, subject: &Subject) -> Result<Vec<f64>> {
        let mut clock = Clock { lab, events: Vec::new(), spans: Vec::new() };
        match mode {
            Mode::Token => self.turns(subject, &mut clock, || lab.read_step())?,
            Mode::Gap => self.turns(subject, &mut clock, || idle(lab))?,
            Mode::Loop => self.bursts(subject, &mut clock)?,
        }
        lab.synchronize()?;
        let nodes = |which: usize| subject.works[which].1.nodes as f64;
        (0..subject.works.len()).map(|which| Ok(clock.median_us(which)? / nodes(which))).collect()
    }

    fn turns(&self, subject: &Subject, clock: &mut Clock<'_>, before: impl Fn() -> Result<()>) -> Result<()> {
        const WARM_UP: usize = 2;
        for turn in 0..WARM_UP + self.repetitions {
            for (which, (_, work)) in subject.works.iter().enumerate() {
                before()?;
                let start = clock.mark()?;
                work.launch()?;
                let end = clock.mark()?;
                if turn >= WARM_UP {
                    clock.spans.push((which, start, end));
                }
            }
        }
        Ok(())
    }

    /// Launches of one work in a row. The first few of a burst find the card as the work before left it.
    fn bursts(&self, subject: &Subject, clock: &mut Clock<'_>) -> Result<()> {
        const SETTLE: usize = 5;
        for _ in 0..3 {
            for (which, (_, work)) in subject.works.iter().enumerate() {
                let mut start = clock.mark()?;
                for launch in 0..SETTLE + self.repetitions {
                    work.launch()?;
                    let end = clock.mark()?;
                    if launch >= SETTLE {
                        clock.spans.push((which, start, end));
                    }
                    start = end;
                }
            }
        }
        Ok(())
    }
}

/// Keeps the stream, and so the card, idle for 40 ms. On the stream and not on the host: what follows is
/// enqueued meanwhile, and its figure holds no time of the host.
fn idle(lab: &Lab) -> Result<()> {
    unsafe extern "C" fn sleep(_: *mut c_void) {
        std::thread::sleep(Duration::from_millis(40));
    }
    // SAFETY: a live stream; the function makes no CUDA calls and does not unwind.
    Ok(unsafe { result::stream::launch_host_function(lab.cuda.cu_stream(), sleep, std::ptr::null_mut()) }?)
}

struct Clock<'l> {
    lab: &'l Lab,
    events: Vec<CudaEvent>,
    /// (which work, from event, to event)
    spans: Vec<(usize, usize, usize)>,
}

impl Clock<'_> {
    fn mark(&mut self) -> Result<usize> {
        let event = self.lab.cuda.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        event.record(&self.lab.cuda)?;
        self.events.push(event);
        Ok(self.events.len() - 1)
    }

    fn median_us(&self, which: usize) -> Result<f64> {
        let mut times = Vec::new();
        for (_, start, end) in self.spans.iter().filter(|(w, ..)| *w == which) {
            times.push(f64::from(self.events[*start].elapsed_ms(&self.events[*end])?) * 1e3);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}
