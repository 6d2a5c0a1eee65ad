"""The sections of the report, one file a topic; each turns `RunView`s into a `page.Section`."""
