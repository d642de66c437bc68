package webhook

import (
	"encoding/json"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
)

// What a request may take is bounded, whoever sends it: of all shapes those with the most memory for a byte.
func TestBounded(t *testing.T) {
	s, _ := newServer(t)
	for name, c := range map[string]struct {
		path, kind, head, value string
		load
	}{
		"containers": {PathVerify, "Pod", `{"spec":{"containers":[`, "{}", podLoad},
		"nulls":      {PathInject, "Pod", `{"spec":{"initContainers":[`, "null", podLoad},
		"debugging":  {PathEphemeral, "Pod", `{"spec":{"initContainers":[{"name":"mantlet-proxy","restartPolicy":"Always"}],"ephemeralContainers":[`, "{}", podLoad},
		"peers":      {PathPolicy, "NetworkPolicy", `{"spec":{"ingress":[`, "{}", policyLoad},
	} {
		for _, n := range []int{c.values / 2, c.values - 100, 2_000_000} {
			each := c.value + ","
			body := review(admissionv1.Create, c.kind, "shop", c.head+strings.Repeat(each, n/values([]byte(each)))+c.value+"]}}")
			most := len(body)*byteMemory + c.values*c.each
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			code, _ := post(t, s, c.path, "application/json", body)
			runtime.ReadMemStats(&after)
			if code == http.StatusBadRequest || (code == http.StatusRequestEntityTooLarge) != (values([]byte(body)) > c.values || len(body) > maxReview) {
				t.Errorf("%s: %d values: status %d", name, values([]byte(body)), code)
			}
			if took := int(after.TotalAlloc - before.TotalAlloc); took > most {
				t.Errorf("%s: %d values in %d KiB take %d MiB, more than the %d that are set aside", name, values([]byte(body)), len(body)>>10, took>>20, most>>20)
			}
		}
	}
	if s.budget.total != 0 || len(s.budget.sources) != 0 {
		t.Errorf("not all is given back: %+v", s.budget.sources)
	}
}

// One address cannot take all, nor leave anything behind; all together take no more than there is.
func TestBudget(t *testing.T) {
	var b budget
	address := func(i byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, i}) }
	if !b.take(address(1), maxSourceMemory) || b.take(address(1), 1) {
		t.Error("one address")
	}
	if !b.take(address(2), maxSourceMemory) || !b.take(address(3), maxMemory-2*maxSourceMemory) || b.take(address(4), 1) {
		t.Error("all of them")
	}
	b.giveBack(address(1), maxSourceMemory)
	if !b.take(address(4), 1) || len(b.sources) != 3 {
		t.Error("what is given back is not there")
	}
}

// Never fewer than there are, for texts that a decoder reads.
func FuzzValues(f *testing.F) {
	for _, text := range []string{`{}`, `[1,[2,"a,b\",[",{}],null]`, `{"a":"\\","b":[]}`, `"`, `3`} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var v any
		if json.Unmarshal([]byte(text), &v) != nil {
			return
		}
		if got, want := values([]byte(text)), elements(v); got < want {
			t.Errorf("%q: %d, and it has %d", text, got, want)
		}
	})
}

// elements counts what lists and objects hold, where no key comes twice.
func elements(v any) (n int) {
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			n += 1 + elements(e)
		}
	case map[string]any:
		for _, e := range v {
			n += 1 + elements(e)
		}
	}
	return n
}
