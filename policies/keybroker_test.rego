# Each rule with its allow and its deny; `opa test policies/`. That the WebAssembly agrees is shown by tests/integration/policy.
package keybroker_test

import data.keybroker

api := {
	"spiffe_id": "spiffe://example.org/payments/api",
	"trust_domain": "example.org",
	"path": ["payments", "api"],
	"networks": ["office"],
}

request := {
	"v": 1,
	"caller": api,
	"operation": "sign",
	"target": {"kind": "key", "id": "orders", "workload": ""},
	"algorithm": "ES256",
}

read_trail(workload) := object.union(request, {
	"operation": "read-audit",
	"algorithm": "",
	"target": {"kind": "trail", "id": "", "workload": workload},
})

obligation := {
	"grant": "g",
	"not_before": "",
	"not_after": "",
	"hours": [],
	"limits": [{"max": 1, "window_s": 60, "per": "key"}],
	"quorum": [],
	"cool_off_s": 0,
	"expires_s": 0,
	"evidence": [],
	"observe_only": false,
}

when_read := object.union(obligation, {"limits": []})

when_changed := object.union(when_read, {"quorum": [{"approvals": 1, "of": ["admins"], "people": ["alice"]}], "expires_s": 60})

rule := {
	"id": "g",
	"obligation": obligation,
	"when_changed": when_changed,
	"when_read": when_read,
	"path": ["payments", "*"],
	"is_open": false,
	"keys": ["orders"],
	"operations": ["sign"],
	"algorithms": ["ES256"],
	"trails": [],
	"subjects": [],
	"tokens": [],
	"waives": [],
	"networks": [],
}

none := {"exact": {}, "prefix": {}, "domain": {}, "anybody": []}

rules(grants, denies) := {
	"policy": "digest",
	"grants": object.union(none, {"prefix": {"example.org/payments": grants}}),
	"denies": object.union(none, {"prefix": {"example.org/payments": denies}}),
}

decide(grants, denies, asked) := answer if {
	answer := keybroker.decision with input as asked with data.keybroker_rules as rules(grants, denies)
}

test_grant_allows_and_names_itself if {
	answer := decide([rule], [], request)
	answer.allow
	answer.grants == ["g"]
	answer.reasons == []
	answer.policy == "digest"
	answer.obligations == [obligation]
}

test_nothing_said_means_no if {
	decide([], [], request) == {
		"allow": false,
		"reasons": ["no-grant"],
		"grants": [],
		"policy": "digest",
		"obligations": [],
	}
}

test_other_key_looks_like_no_key if {
	decide([object.union(rule, {"keys": ["release"]})], [], request).reasons == ["no-grant"]
}

test_star_is_every_key if decide([object.union(rule, {"keys": ["*"]})], [], request).allow

test_operation_that_is_not_granted if {
	answer := decide([object.union(rule, {"operations": ["sign-digest"]})], [], request)
	not answer.allow
	answer.reasons == ["operation-not-granted"]
}

test_algorithm_that_is_not_granted if {
	answer := decide([object.union(rule, {"algorithms": ["ES384"]})], [], request)
	not answer.allow
	answer.reasons == ["algorithm-not-granted"]
}

test_reading_a_key_needs_no_algorithm if {
	decide([object.union(rule, {"operations": ["read-key"]})], [], object.union(request, {"operation": "read-key", "algorithm": ""})).allow
}

test_network_binds if {
	decide([object.union(rule, {"networks": ["office"]})], [], request).allow
	answer := decide([object.union(rule, {"networks": ["lab"]})], [], request)
	not answer.allow
	answer.reasons == ["network-not-granted"]
}

test_star_is_one_segment if {
	deeper := object.union(request, {"caller": object.union(api, {"path": ["payments", "api", "v2"]})})
	not decide([rule], [], deeper).allow
	decide([object.union(rule, {"path": ["payments"], "is_open": true})], [], deeper).allow
}

test_open_pattern_needs_one_more_segment if {
	exactly := object.union(request, {"caller": object.union(api, {"path": ["payments"]})})
	not decide([object.union(rule, {"path": ["payments"], "is_open": true})], [], exactly).allow
}

test_deny_wins_and_says_so if {
	answer := decide([rule], [object.union(rule, {"id": "d", "keys": [], "operations": [], "algorithms": []})], request)
	not answer.allow
	answer.reasons == ["denied-by:d"]
	answer.grants == []
	answer.obligations == []
}

test_deny_of_something_else_does_not if {
	decide([rule], [object.union(rule, {"id": "d", "algorithms": ["RS256"]})], request).allow
}

test_exact_domain_and_anybody if {
	every place in [
		{"exact": {"spiffe://example.org/payments/api": [rule]}},
		{"domain": {"example.org": [rule]}},
		{"anybody": [rule]},
	] {
		found := {"policy": "digest", "grants": object.union(none, place), "denies": none}
		answer := keybroker.decision with input as request with data.keybroker_rules as found
		answer.allow
	}
}

test_reading_is_not_a_use if {
	reads := object.union(rule, {"operations": ["read-key"]})
	decide([reads], [], object.union(request, {"operation": "read-key", "algorithm": ""})).obligations == [when_read]
}

test_own_trail_demands_nothing if {
	decide([], [], read_trail("spiffe://example.org/payments/api")).obligations == [object.union(when_read, {"grant": "own-trail"})]
}

test_own_trail_needs_no_grant_and_others_do if {
	decide([], [], read_trail("spiffe://example.org/payments/api")).grants == ["own-trail"]
	not decide([], [], read_trail("spiffe://example.org/payments/other")).allow
	not decide([], [], read_trail("")).allow
}

test_own_trail_can_be_denied if {
	deny := object.union(rule, {"id": "d", "keys": [], "operations": ["read-audit"], "algorithms": []})
	answer := decide([], [deny], read_trail("spiffe://example.org/payments/api"))
	not answer.allow
	answer.reasons == ["denied-by:d"]
}

test_deny_of_one_trail_denies_the_whole_record if {
	everything := {"path": [], "is_open": true, "is_any": true}
	one := {"path": ["spiffe:", "", "example.org", "ceo"], "is_open": false, "is_any": false}
	reads := object.union(rule, {"operations": ["read-audit"], "keys": [], "algorithms": [], "trails": [everything]})
	deny := object.union(reads, {"id": "d", "operations": [], "trails": [one]})
	decide([reads], [], read_trail("")).allow
	decide([reads], [deny], read_trail("spiffe://example.org/ci")).allow
	decide([reads], [deny], read_trail("spiffe://example.org/ceo")).reasons == ["denied-by:d"]
	decide([reads], [deny], read_trail("")).reasons == ["denied-by:d"]
}

test_deny_of_keys_and_trails_fits_either if {
	trail := {"path": ["spiffe:", "", "example.org", "payments", "api"], "is_open": false, "is_any": false}
	deny := object.union(rule, {"id": "d", "keys": ["orders"], "operations": [], "algorithms": [], "trails": [trail]})
	decide([rule], [deny], request).reasons == ["denied-by:d"]
	decide([rule], [deny], read_trail("spiffe://example.org/payments/api")).reasons == ["denied-by:d"]
	decide([object.union(rule, {"keys": ["*"]})], [deny], object.union(request, {"target": {"kind": "key", "id": "release", "workload": ""}})).allow
}

test_deny_without_algorithms_fits_a_request_without_one if {
	reading := object.union(object.remove(request, ["algorithm"]), {"operation": "read-key"})
	reads := object.union(rule, {"operations": ["read-key"]})
	decide([reads], [], reading).allow
	decide([reads], [object.union(reads, {"id": "d", "algorithms": []})], reading).reasons == ["denied-by:d"]
}

test_trail_patterns if {
	trails := object.union(rule, {
		"operations": ["read-audit"],
		"keys": [],
		"algorithms": [],
		"trails": [{"path": ["spiffe:", "", "example.org", "ci", "*"], "is_open": false, "is_any": false}],
	})
	decide([trails], [], read_trail("spiffe://example.org/ci/release")).allow
	not decide([trails], [], read_trail("spiffe://example.org/ops/release")).allow
	not decide([trails], [], read_trail("")).allow
	anything := object.union(trails, {"trails": [{"path": [], "is_open": true, "is_any": true}]})
	decide([anything], [], read_trail("")).allow
}

test_two_grants_bind_together if {
	answer := decide([rule, object.union(rule, {"id": "h", "obligation": {"grant": "h"}})], [], request)
	answer.grants == ["g", "h"]
	answer.obligations == [obligation, object.union(obligation, {"grant": "h"})]
}

test_rule_that_fits_twice_counts_once if {
	answer := decide([rule, rule], [], request)
	answer.grants == ["g"]
	answer.obligations == [obligation]
}

# Approving: membership grants it, for the key and the workload of a grant that demands it.

demanding := object.union(rule, {
	"keys": ["release"],
	"obligation": object.union(obligation, {"quorum": [
		{"approvals": 1, "of": ["legal"], "people": ["dora"]},
		{"approvals": 2, "of": ["managers"], "people": ["alice", "bob"]},
	]}),
})

people := {
	"spiffe://example.org/human/alice": "alice",
	"spiffe://example.org/laptop/dora": "dora",
	"spiffe://example.org/human/eve": "eve",
}

human(id) := {
	"spiffe_id": id,
	"trust_domain": "example.org",
	"path": array.slice(split(id, "/"), 3, 9),
	"networks": [],
}

approve(id, key, workload) := object.union(request, {
	"caller": human(id),
	"operation": "approve",
	"algorithm": "",
	"target": {"kind": "key", "id": key, "workload": workload},
})

api_id := "spiffe://example.org/payments/api"

alice := "spiffe://example.org/human/alice"

ask_to_approve(id, key, workload, denies) := answer if {
	answer := keybroker.decision with input as approve(id, key, workload) with data.keybroker_rules as {
		"policy": "digest",
		"grants": object.union(none, {"prefix": {"example.org/payments": [demanding]}}),
		"denies": object.union(none, {"anybody": denies}),
		"people": people,
	}
}

test_member_of_any_stage_may_approve if {
	answer := ask_to_approve(alice, "release", api_id, [])
	answer.allow
	answer.grants == ["g"]
	answer.obligations == [object.union(obligation, {"limits": []})]
	ask_to_approve("spiffe://example.org/laptop/dora", "release", api_id, []).allow
}

test_others_may_not_approve_and_are_told_nothing if {
	ask_to_approve("spiffe://example.org/human/eve", "release", api_id, []).reasons == ["no-grant"]
	ask_to_approve("spiffe://example.org/human/nobody", "release", api_id, []).reasons == ["no-grant"]
}

test_member_may_not_approve_another_key_or_another_workload if {
	ask_to_approve(alice, "orders", api_id, []).reasons == ["no-grant"]
	ask_to_approve(alice, "release", "spiffe://example.org/ci/api", []).reasons == ["no-grant"]
	ask_to_approve(alice, "release", "spiffe://example.com/payments/api", []).reasons == ["no-grant"]
	ask_to_approve(alice, "release", "spiffe://example.org/payments", []).reasons == ["no-grant"]
	ask_to_approve(alice, "release", "", []).reasons == ["no-grant"]
}

test_deny_wins_over_membership if {
	stop := object.union(rule, {"id": "d", "keys": ["release"], "operations": ["approve"], "algorithms": []})
	answer := ask_to_approve(alice, "release", api_id, [stop])
	not answer.allow
	answer.reasons == ["denied-by:d"]
	ask_to_approve(alice, "release", api_id, [object.union(stop, {"keys": ["orders"]})]).allow
}

test_membership_grants_nothing_else if {
	asked := object.union(approve(alice, "release", api_id), {"operation": "sign", "algorithm": "ES256"})
	answer := keybroker.decision with input as asked with data.keybroker_rules as {
		"policy": "digest",
		"grants": object.union(none, {"prefix": {"example.org/payments": [demanding]}}),
		"denies": none,
		"people": people,
	}
	answer.reasons == ["no-grant"]
}

# Roles are rules: who may freeze, change the rules, break the glass.

act(operation, target) := object.union(request, {
	"operation": operation,
	"algorithm": "",
	"target": object.union({"id": "", "workload": ""}, target),
})

may(operation, selectors) := object.union(
	object.union(rule, {"keys": [], "algorithms": [], "operations": [operation]}),
	selectors,
)

anyone := {"path": [], "is_open": true, "is_any": true}

ci := {"path": ["spiffe:", "", "example.org", "ci"], "is_open": true, "is_any": false}

test_freeze_of_a_workload_needs_a_subject_that_fits if {
	asked := act("freeze", {"kind": "workload", "workload": "spiffe://example.org/ci/release"})
	decide([may("freeze", {"subjects": [ci]})], [], asked).allow
	decide([may("freeze", {"subjects": [anyone]})], [], asked).allow
	decide([may("freeze", {"keys": ["*"], "tokens": ["*"]})], [], asked).reasons == ["no-grant"]
	decide([may("unfreeze", {"subjects": [ci]})], [], asked).reasons == ["operation-not-granted"]
	other := act("freeze", {"kind": "workload", "workload": "spiffe://example.org/ops/release"})
	decide([may("freeze", {"subjects": [ci]})], [], other).reasons == ["no-grant"]
}

test_freeze_of_a_key_and_of_a_token if {
	key := act("freeze", {"kind": "key", "id": "orders"})
	decide([may("freeze", {"keys": ["orders"]})], [], key).allow
	decide([may("freeze", {"keys": ["release"]})], [], key).reasons == ["no-grant"]
	token := act("freeze", {"kind": "token", "id": "main"})
	decide([may("freeze", {"tokens": ["main"]})], [], token).allow
	decide([may("freeze", {"tokens": ["*"]})], [], token).allow
	decide([may("freeze", {"tokens": ["other"], "keys": ["main"]})], [], token).reasons == ["no-grant"]
}

test_freeze_of_everything_needs_every_subject if {
	everything := act("freeze", {"kind": "everything"})
	decide([may("freeze", {"subjects": [anyone]})], [], everything).allow
	decide([may("freeze", {"subjects": [ci], "keys": ["*"], "tokens": ["*"]})], [], everything).reasons == ["no-grant"]
	spared := may("freeze", {"id": "d", "subjects": [ci]})
	decide([may("freeze", {"subjects": [anyone]})], [spared], everything).reasons == ["denied-by:d"]
}

test_signing_grant_does_not_freeze_and_freezing_grant_does_not_sign if {
	decide([rule], [], act("freeze", {"kind": "key", "id": "orders"})).reasons == ["operation-not-granted"]
	decide([may("freeze", {"keys": ["orders"]})], [], request).reasons == ["operation-not-granted"]
}

test_change_of_the_rules_needs_its_own_operation if {
	change := act("admin-policy", {"kind": "policy"})
	decide([may("admin-policy", {})], [], change).allow
	decide([may("freeze", {"subjects": [anyone], "keys": ["*"], "tokens": ["*"]})], [], change).reasons == ["no-grant"]
	decide([may("admin-policy", {})], [may("admin-policy", {"id": "d"})], change).reasons == ["denied-by:d"]
}

test_glass_is_broken_for_named_grants_only if {
	named := may("break-glass", {"waives": ["release"]})
	decide([named], [], act("break-glass", {"kind": "grant", "id": "release"})).allow
	decide([named], [], act("break-glass", {"kind": "grant", "id": "payments"})).reasons == ["no-grant"]
	decide([may("freeze", {"keys": ["*"]})], [], act("break-glass", {"kind": "grant", "id": "release"})).reasons == ["no-grant"]
}

test_role_is_an_operation_on_any_target if {
	some_target := act("freeze", {"kind": "any"})
	decide([may("freeze", {"keys": ["release"]})], [], some_target).allow
	not decide([may("unfreeze", {"keys": ["release"]})], [], some_target).allow
	decide([may("freeze", {"keys": ["release"]})], [may("freeze", {"id": "d", "keys": ["orders"]})], some_target).allow
	decide([may("freeze", {"keys": ["release"]})], [may("freeze", {"id": "d"})], some_target).reasons == ["denied-by:d"]
	decide([], [], some_target).reasons == ["no-grant"]
}

test_what_widens_access_needs_others_and_what_narrows_does_not if {
	decide([may("admin-policy", {})], [], act("admin-policy", {"kind": "policy"})).obligations == [when_changed]
	key := {"kind": "key", "id": "orders"}
	decide([may("unfreeze", {"keys": ["orders"]})], [], act("unfreeze", key)).obligations == [when_changed]
	decide([may("freeze", {"keys": ["orders"]})], [], act("freeze", key)).obligations == [when_read]
	glass := may("break-glass", {"waives": ["release"]})
	decide([glass], [], act("break-glass", {"kind": "grant", "id": "release"})).obligations == [when_read]
}
