//! The few conversions of `strftime` that chat templates ask for today's date with.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// The current time in UTC by `format`.
pub(super) fn now(format: &str) -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    at(seconds, format)
}

/// `seconds` after the epoch by `format`; conversions other than `%Y %y %m %B %b %d %A %a %H %M %S %%` stay
/// as they are.
fn at(seconds: u64, format: &str) -> String {
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('d') => out += &format!("{day:02}"),
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{:02}", time / 3600),
            Some('M') => out += &format!("{:02}", time / 60 % 60),
            Some('S') => out += &format!("{:02}", time % 60),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of a number of days after 1970-01-01: 400-year eras that begin on 1 March.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::at;

    #[test]
    fn dates_equal_pythons() {
        // datetime.fromtimestamp(s, UTC).strftime("%a %A %d %b %B %m %y %Y %H:%M:%S %%")
        for (seconds, expected) in [
            (0, "Thu Thursday 01 Jan January 01 70 1970 00:00:00 %"),
            (951_782_399, "Mon Monday 28 Feb February 02 00 2000 23:59:59 %"),
            (951_868_800, "Wed Wednesday 01 Mar March 03 00 2000 00:00:00 %"),
            (1_735_603_200, "Tue Tuesday 31 Dec December 12 24 2024 00:00:00 %"),
            (4_107_542_400, "Mon Monday 01 Mar March 03 00 2100 00:00:00 %"),
        ] {
            assert_eq!(at(seconds, "%a %A %d %b %B %m %y %Y %H:%M:%S %%"), expected);
        }
    }
}
