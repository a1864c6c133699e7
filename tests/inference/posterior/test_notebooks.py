def test_arviz_loses_no_site_to_a_name_of_its_own():
    def program():
        pyro.sample("z", Words())
        for name, mean in {"length(z)": 5.0, "z_text": 6.0, "draw": 7.0, "x": 8.0}.items():
            pyro.sample(name, dist.Delta(torch.tensor(mean)))

    found = Importance(program, num_particles=10).run().to_arviz().posterior
    sites = {"length(z)_site": 5.0, "z_text_site": 6.0, "draw_site": 7.0, "x": 8.0}
    assert {name: float(found[name].mean()) for name in sites} == sites
    assert 1 <= float(found["length(z)"].mean()) <= 2 and found["one_hot(z)"].dims[-1] == "z_text"
