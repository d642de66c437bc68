package server

import "testing"

func TestExplanation(t *testing.T) {
	for reason, want := range map[string]string{
		"Error adding/updating listener(s) gate: no":                                         "Error adding/updating listener(s) gate: no",
		"goo.gle/debugproto  \nname: \"gate\"\nx {\n}\n: Proto constraint validation failed": "Proto constraint validation failed",
		"goo.gle/debugstr name: 1":                                                           "goo.gle/debugstr name: 1",
		"not a dump\n: at all":                                                               "not a dump\n: at all",
		"":                                                                                   "",
	} {
		if got := explanation(reason); got != want {
			t.Errorf("%q: %q, want %q", reason, got, want)
		}
	}
}
